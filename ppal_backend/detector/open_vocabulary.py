"""Detectors with an open vocabulary: a text encoder reads a prompt for each label.

mmdetection fetches its text encoder from a hub while it builds a detector. Here it is built from the zoo's vocabulary,
and its weights are those in the detector's checkpoint: nothing is fetched but what the zoo names. The checkpoint of a
detector holds its prompts and the vocabulary too, so that it says the same wherever it is loaded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.models.language_models.bert import generate_masks_with_special_tokens_and_transfer_map
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.model import BaseModel

from ppal_backend.detector.zoo import ZooEntry
from ppal_backend.detector.zoo.fetch import vocabulary_file
from ppal_backend.detector.zoo.prompts import REMEDY, package_problem, prompts_of, same_prompt
from ppal_backend.errors import DetectorError

ENCODER = "PromptEncoder"
_UNKNOWN, _ENDS = "[UNK]", {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
_SEPARATORS = ("[CLS]", "[SEP]", ".", "?")
_DATASET_STEPS = ("RandomSamplingNegPos",)  # they need the class lists of the data sets that mmdetection pretrains on
_META = ("text", "custom_entities")
_USUAL_META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


@dataclass(frozen=True)
class Prompts:
    """What a detector is asked for.

    Args:
        texts: A prompt for each label, in the order of the class indices.
        vocabulary: Word pieces of its text encoder, one a line.
    """

    texts: tuple[str, ...]
    vocabulary: str

    @classmethod
    def of(
        cls, entry: ZooEntry, labels: Sequence[str], given: Mapping[str, Sequence[str]], weights_dir: Path | None = None
    ) -> Prompts | None:
        """Those of a training; None for a detector without an open vocabulary.

        Args:
            entry: Zoo entry.
            labels: Labels in the order of the class indices.
            given: Label -> its prompt, alone in a list; see :func:`~ppal_backend.detector.zoo.prompts.prompts_of`.
            weights_dir: Folder for downloads; None for the default one.

        Raises:
            WeightsUnavailable: The vocabulary cannot be had.
            DetectorError: A prompt is empty or there twice, or the package that reads prompts is not installed.
        """
        if entry.vocabulary is None:
            return None
        if problem := package_problem(entry):
            raise DetectorError(problem)
        texts = prompts_of(labels, given)
        return cls(texts, vocabulary_file(entry, weights_dir).read_bytes().decode())

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Prompts | None:
        """Those of a checkpoint; None where it has none."""
        return cls(tuple(meta["prompts"]), meta["vocabulary"]) if "vocabulary" in meta else None

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of them."""
        return {"prompts": list(self.texts), "vocabulary": self.vocabulary}


def is_open(model: Mapping[str, Any]) -> bool:
    """Whether the configuration of a detector has a text encoder."""
    return "language_model" in model


def set_prompts(model: dict[str, Any], pipelines: Sequence[list[dict[str, Any]]], prompts: Prompts) -> None:
    """Give a detector's configuration its text encoder, and its pipelines the prompts, in place.

    Args:
        model: Configuration of the detector.
        pipelines: Steps of its pipelines; the last one of each packs the image.
        prompts: What to look for.

    Raises:
        DetectorError: The detector reads no prompts, or its text encoder cannot take these.
    """
    if not is_open(model):
        raise DetectorError("expected a detector with a language_model for the zoo's vocabulary, got one without")
    given = model["language_model"]
    limit = given.get("max_tokens", 256)
    encoder = {"type": ENCODER, "vocabulary": prompts.vocabulary, "max_tokens": limit, "bert": given.get("bert", {})}
    model["language_model"] = encoder
    _check_words(tokenizer_of(prompts.vocabulary), prompts.texts, limit)
    for steps in filter(None, pipelines):
        kept = [step for step in steps if step["type"] not in (*_DATASET_STEPS, "AddPrompts")]
        pack = dict(kept[-1])
        pack["meta_keys"] = tuple(dict.fromkeys((*pack.get("meta_keys", _USUAL_META), *_META)))
        steps[:] = [*kept[:-1], {"type": "AddPrompts", "texts": list(prompts.texts)}, pack]


def _check_words(tokenizer: Any, texts: Sequence[str], limit: int) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for text in texts:
        tokens = tuple(tokenizer(text, add_special_tokens=False).input_ids)
        if not set(tokens) - {tokenizer.unk_token_id}:
            raise DetectorError(
                f"expected words that the text encoder knows in the prompt {text!r}, got none; say it in English "
                f"words, {REMEDY}"
            )
        other = seen.setdefault(tokens, text)
        if other != text:
            raise same_prompt(other, text, tokenizer.decode(tokens))
    count = len(tokenizer(_caption(texts)).input_ids)
    if count > limit:
        raise DetectorError(
            f"expected prompts of at most {limit} tokens together, got {count} for {len(texts)} labels (one or more a "
            f"word, and one for each end); shorten them, {REMEDY}, or train a detector that reads no prompts"
        )


def _caption(texts: Sequence[str]) -> str:
    """The prompts as mmdetection puts them together."""
    return "".join(f"{text}. " for text in texts)


def tokenizer_of(vocabulary: str) -> Any:
    """BERT's uncased tokenizer of a vocabulary.

    Raises:
        DetectorError: The vocabulary lacks a token that every text has.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    pieces = {piece: index for index, piece in enumerate(vocabulary.removesuffix("\n").split("\n"))}
    missing = sorted({_UNKNOWN, *_ENDS.values(), *_SEPARATORS} - set(pieces))
    if missing:
        raise DetectorError(f"expected {', '.join(missing)} in the vocabulary, got none; use that of BERT, uncased")
    words = BertWordPieceTokenizer(pieces, lowercase=True)
    return PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, unk_token=_UNKNOWN, **_ENDS)


@TRANSFORMS.register_module()
class AddPrompts:
    """Says in a packed image what to look for, as Grounding DINO expects it.

    Args:
        texts: A prompt for each class.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(str(text) for text in texts)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        return {**results, "text": self._texts, "custom_entities": True}


@MODELS.register_module(name=ENCODER)
class PromptEncoder(BaseModel):
    """mmdetection's ``BertModel`` (arXiv:2303.05499, with representations by sub-sentence), from a vocabulary at hand.

    Weights have the names that they have there; they are random until a checkpoint brings them.

    Args:
        vocabulary: Word pieces, one a line.
        max_tokens: Longest text; the rest is cut off, which :func:`set_prompts` refuses beforehand.
        bert: What differs from BERT base (``transformers.BertConfig``).
    """

    pad_to_max = False

    def __init__(self, vocabulary: str, max_tokens: int = 256, bert: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from transformers import BertConfig

        self.tokenizer, self.max_tokens = tokenizer_of(vocabulary), max_tokens
        config = BertConfig(vocab_size=len(self.tokenizer), **(bert or {}))
        self.language_backbone = torch.nn.Sequential(OrderedDict(body=_Body(config)))
        self._separators = self.tokenizer.convert_tokens_to_ids(list(_SEPARATORS))

    def forward(self, captions: Sequence[str], **_unused: Any) -> dict[str, torch.Tensor]:
        """Features of the tokens of each caption, ``[n, tokens, d]``; a token attends to its own prompt alone."""
        device = next(self.parameters()).device
        tokens = self.tokenizer(
            list(captions), max_length=self.max_tokens, truncation=True, padding="longest", return_tensors="pt"
        ).to(device)
        mask, positions = generate_masks_with_special_tokens_and_transfer_map(tokens, self._separators)
        features = self.language_backbone[0](tokens.input_ids, mask, positions)
        return {
            "embedded": features,
            "masks": mask,
            "hidden": features,
            "position_ids": positions,
            "text_token_mask": tokens.attention_mask.bool(),
        }


class _Body(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.bert.modeling_bert import BertModel

        self.model = BertModel(config, add_pooling_layer=False)
        self.language_dim = config.hidden_size

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model(
            input_ids=tokens,
            attention_mask=mask[:, None],  # one for all heads
            position_ids=positions,
            token_type_ids=torch.zeros_like(tokens),
        ).last_hidden_state
        return features
