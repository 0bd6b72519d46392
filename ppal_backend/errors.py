"""Every error this package raises on purpose, in one tree.

    PPALError
    ├── SettingsError              a setting or an extra parameter is missing or out of range
    ├── LabelConfigError           the labeling config has no boxes on an image, or cannot be read
    ├── ImageError                 an image is gone, truncated, too large or not an image
    ├── DatasetError               a COCO file or an annotation export cannot be used
    ├── TooFewAnnotations          a round needs more annotated images than there are
    ├── RoundCancelled             somebody asked the round to stop; it can be resumed
    ├── LeaseLost                  another process may hold the round; this one must change nothing any more
    ├── StateError                 stored state does not allow what was asked (unknown project, no version …)
    │   ├── DamagedArtifact            a file in the bucket of the artifacts is not as it was written
    │   └── NoState                    there is no state where the settings look for it
    ├── StoreUnavailable           the state database is locked, full or down: worth another try
    ├── QueueUnavailable           the job queue does not answer: worth another try
    ├── ArtifactsUnavailable       the bucket of the artifacts does not answer: worth another try
    ├── OutOfSpace                 the disk is (nearly) full; the round waits until there is space
    ├── LabelStudioError           Label Studio refused a call
    │   ├── LabelStudioUnavailable     it is down, slow or answered 5xx: worth another try
    │   ├── LabelStudioAuthError       it refused the token
    │   └── PublishError               it did not take the predictions as sent
    └── DetectorError              a detector cannot be built, trained or run
        ├── EngineUnavailable          the cluster that trains does not answer: worth another try
        ├── UnknownDetector            no such entry in the model zoo
        ├── WeightsUnavailable         initial weights are neither on disk nor downloadable
        ├── UnsupportedHead            no head family covers this detector
        ├── OutOfMemory                a training step does not fit into memory
        └── CheckpointError            a checkpoint is damaged or not safe to load

Messages say what was expected, what came and what to do, and are fit to be shown to people:
they hold no token, password or traceback. Wrong arguments to a pure function raise ``ValueError``.
"""

from __future__ import annotations

LONGEST_MESSAGE = 900


class PPALError(Exception):
    """Base of all errors of this package. A message is shortened in its middle: inputs that it quotes may be whole
    files, and what was expected and what to do stand at its ends."""

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > LONGEST_MESSAGE:
            text = f"{text[: LONGEST_MESSAGE * 2 // 3]} … {text[-LONGEST_MESSAGE // 3 :]}"
        super().__init__(text)


class SettingsError(PPALError):
    """A setting or an extra parameter is missing or out of range."""


class LabelConfigError(PPALError):
    """The labeling config offers no RectangleLabels on an Image, or cannot be read."""


class ImageError(PPALError):
    """An image is gone, truncated, too large or not an image."""


class ImageInterrupted(ImageError):
    """The transfer of an image ended too soon; another try may bring all of it."""


class DatasetError(PPALError):
    """A COCO file or an annotation export cannot be used."""


class TooFewAnnotations(PPALError):
    """A round needs more annotated images than there are."""


class RoundCancelled(PPALError):
    """Somebody asked the round to stop; what is complete stays and the round can be resumed."""


class LeaseLost(PPALError):
    """The round is no longer held by this process, which must change nothing of it any more."""


class StateError(PPALError):
    """Stored state does not allow what was asked."""


class DamagedArtifact(StateError):
    """A file in the bucket of the artifacts is not as it was written."""


class NoState(StateError):
    """No backend has kept state where the settings look for it."""


class StoreUnavailable(PPALError):
    """The state database is locked, full or down; another try may succeed."""


class QueueUnavailable(PPALError):
    """The job queue does not answer; another try may succeed."""


class ArtifactsUnavailable(PPALError):
    """The bucket of the artifacts does not answer; another try may succeed."""


class OutOfSpace(PPALError):
    """The disk is full, or nearly; the round waits until there is space."""


class LabelStudioError(PPALError):
    """Label Studio refused a call."""


class LabelStudioUnavailable(LabelStudioError):
    """Label Studio is down, slow or answered with a server error; another try may succeed."""


class LabelStudioAuthError(LabelStudioError):
    """Label Studio refused the token."""


class PublishError(LabelStudioError):
    """Label Studio did not take the predictions as they were sent."""


class DetectorError(PPALError):
    """A detector cannot be built, trained or run."""


class EngineUnavailable(DetectorError):
    """The cluster that trains and predicts does not answer; another try may succeed."""


class UnknownDetector(DetectorError):
    """The model zoo has no entry of this name."""


class WeightsUnavailable(DetectorError):
    """Initial weights are neither on disk nor downloadable."""


class UnsupportedHead(DetectorError):
    """No head family reads this detector's training or traces its predictions."""


class OutOfMemory(DetectorError):
    """A training step does not fit into memory."""


class CheckpointError(DetectorError):
    """A checkpoint is damaged or not safe to load."""
