"""Curves for TensorBoard and MLflow."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.errors import DetectorError


@pytest.fixture
def request_(request_: TrainRequest, test_json: Path) -> TrainRequest:
    """Long enough for one line of losses, which come every 50 steps, and for evaluations."""
    return replace(request_, val_json=test_json, max_iterations=50)


def test_tensorboard_gets_losses_and_the_map_on_held_out_images(request_: TrainRequest) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(replace(request_, tracking="tensorboard"))
    (file,) = Path(request_.work_dir).glob("tracking/**/events.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    loss = events.Scalars("loss")[-1]
    assert loss.step == 50 and loss.value == pytest.approx(result.final_loss, rel=1e-3)
    curve = events.Scalars("held_out/map")
    assert [item.step for item in curve] == [12, 25, 38, 50]
    assert max(item.value for item in curve) == pytest.approx(result.best_map)


def test_mlflow_writes_below_the_folder_of_the_training(
    request_: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the package, which is large: what mmengine's backend asks of it."""
    told: dict[str, Any] = {"metrics": [], "files": []}
    package = ModuleType("mlflow")
    package.__dict__.update(
        __spec__=object(),
        set_tracking_uri=lambda uri: told.update(uri=uri),
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name, artifact_location: None,
        set_experiment=lambda name: None,
        log_metric=lambda name, value, step: told["metrics"].append((name, step)),
        log_metrics=lambda values, step: told["metrics"].extend((name, step) for name in values),
        log_params=lambda values: told.update(params=values),
        log_text=lambda text, name: None,
        log_artifact=lambda path, folder: told["files"].append(Path(path).name),
        end_run=lambda: told.update(ended=True),
    )
    monkeypatch.setitem(sys.modules, "mlflow", package)
    train(replace(request_, tracking="mlflow"))
    assert told["uri"].startswith(f"file://{Path(request_.work_dir) / 'tracking'}") and told["ended"]
    assert told["params"]["optim_wrapper.optimizer.lr"] == 0.002 and told["files"] == ["train.log"]
    assert {("loss", 50), ("held_out/map", 25)} <= set(told["metrics"])


def test_a_missing_package_is_told_before_training(request_: TrainRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DetectorError, match=r"PPAL_TRACKING=mlflow.*pip install mlflow"):
        train(replace(request_, tracking="mlflow"))


def test_an_unknown_tracker_is_refused(request_: TrainRequest) -> None:
    with pytest.raises(ValueError, match="tracking to be one of"):
        replace(request_, tracking="wandb")
