"""Detectors that look for what prompts say: with a text encoder of two layers, a few words and random weights."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppal_backend.detector.config import build_config
from ppal_backend.detector.heads import inference_family
from ppal_backend.detector.infer.exporting_model import export_model
from ppal_backend.detector.infer.inference import PoolImage, PoolInference
from ppal_backend.detector.models import build_model
from ppal_backend.detector.open_vocabulary import Prompts, tokenizer_of
from ppal_backend.detector.runtime import isolated
from ppal_backend.detector.train.training import TrainRequest, train
from ppal_backend.detector.weights import load_final
from ppal_backend.detector.weights.initial import save_as_is
from ppal_backend.detector.zoo import find_entry
from ppal_backend.detector.zoo.choice import weights_problem
from ppal_backend.detector.zoo.fetch import place_weights, vocabulary_file, weights_file
from ppal_backend.detector.zoo.prompts import known_by_prompt, prompts_of
from ppal_backend.errors import DetectorError, UnsupportedHead, WeightsUnavailable
from tests.detector.families import PROMPTS, VOCABULARY, WORDS, batch, build
from tests.detector.shapes import write_set
from tests.detector.test_check import shrunk_zoo

pytest.importorskip("transformers", reason="transformers is not installed (requirements-grounding.txt)")
LABELS = ("c", "sq", "disc")
KNOWN = {"c": ("small red crab",), "sq": ("square",), "disc": ("disc",)}
TEXTS = ("small red crab", "square", "disc")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with the small detector and weights of its own, random ones."""
    root = shrunk_zoo(tmp_path_factory.mktemp("zoo"), "grounding")
    with isolated("test-prompts"):
        torch.manual_seed(3)
        model = build_model(build_config(find_entry("grounding", root), ("a",), prompts=Prompts(("crab",), VOCABULARY)))
        model.init_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    torch.save({"state_dict": model.state_dict()}, root / "own.pth")
    digest = hashlib.sha256((root / "own.pth").read_bytes()).hexdigest()
    table = f'[grounding.weights]\nkind = "detector"\npath = "own.pth"\nsha256 = "{digest}"\nlicence = "MIT"\n'
    (root / "zoo.toml").write_text((root / "zoo.toml").read_text() + table)
    return root


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_set(tmp_path / "images", 4, classes=LABELS)


def pool(images: Path) -> list[PoolImage]:
    return [PoolImage(number, images.parent / f"{number}.png") for number in (1, 2)]


# --- from words to classes --------------------------------------------------------------------------------


def test_a_class_has_the_mean_probability_of_the_words_of_its_prompt() -> None:
    model = build("grounding").eval()
    raw: list[Any] = []
    model.bbox_head.register_forward_hook(lambda module, inputs, output: raw.append(output[0][-1]))
    inference_family(model).trace_inference(model)
    data = batch()
    with torch.no_grad():
        samples = model.test_step({"inputs": data["inputs"], "data_samples": data["data_samples"]})
    for image, sample in enumerate(samples):
        words = raw[0][image].sigmoid()
        classes = torch.stack([words[:, list(places)].mean(1) for places in WORDS], 1)
        best = classes.flatten().sort(descending=True).values[:25]
        found = sample.pred_instances
        np.testing.assert_allclose(found.scores, best, atol=1e-6)
        for row in range(0, 25, 6):  # the probabilities of a detection are those of one query
            assert (classes - found.ppal_probs[row]).abs().sum(1).min() < 1e-5
        assert found.ppal_embeddings.shape == (25, 256)
        assert [PROMPTS[label] for label in found.labels] == found.label_names


def test_prompts_do_not_see_each_other_in_the_text_encoder() -> None:
    """Words of a prompt mean the same wherever it stands and whatever else is asked for."""
    encoder = build("grounding").language_model.eval()
    with torch.no_grad():
        one, other = encoder(["crab. small red boats. "]), encoder(["small red boats. crab. "])
    assert one["embedded"].shape == (1, 9, 16)  # [CLS] crab . small red boat ##s . [SEP]
    assert torch.allclose(one["embedded"][0, 1:3], other["embedded"][0, 6:8], atol=1e-6)
    assert torch.allclose(one["embedded"][0, 3:8], other["embedded"][0, 1:6], atol=1e-6)
    assert not torch.allclose(one["embedded"][0, 3], one["embedded"][0, 4], atol=1e-3)
    assert one["text_token_mask"].all() and one["position_ids"][0].tolist() == [0, 0, 1, 0, 1, 2, 3, 4, 0]


def test_a_short_text_beside_a_longer_one_means_what_it_means_alone() -> None:
    encoder = build("grounding").language_model.eval()
    with torch.no_grad():
        alone, beside = encoder(["crab. "]), encoder(["crab. ", "small red boats. crab. "])
    assert beside["text_token_mask"].sum(1).tolist() == [4, 9]
    assert torch.allclose(alone["embedded"][0, 1:3], beside["embedded"][0, 1:3], atol=1e-6)


def test_the_weights_have_the_names_and_shapes_of_mmdetection() -> None:
    """Those of the text encoder as published checkpoints have them, and DINO's reading of boxes likewise."""
    state = build("grounding").state_dict()
    body = "language_model.language_backbone.body.model."
    assert state[f"{body}embeddings.word_embeddings.weight"].shape == (len(VOCABULARY.split()), 16)
    wanted = {
        *("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"),
        *("embeddings.LayerNorm.weight", "encoder.layer.1.attention.self.query.weight"),
        *("encoder.layer.1.attention.output.LayerNorm.bias", "encoder.layer.0.intermediate.dense.weight"),
        *("encoder.layer.0.output.dense.bias", "encoder.layer.0.attention.output.dense.weight"),
    }
    assert {body + name for name in wanted} <= set(state)
    assert not any("pooler" in name or name.endswith("position_ids") for name in state)
    assert state["dn_query_generator.label_embedding.weight"].shape == (256, 256)
    for name, width in (("grounding", 256), ("dino", 32)):
        assert build(name).decoder.ref_point_head.layers[0].weight.shape == (width, 2 * width)


# --- as published, and trained ----------------------------------------------------------------------------


def test_as_published_it_looks_for_every_label_before_any_training(zoo: Path, images: Path, tmp_path: Path) -> None:
    save_as_is("grounding", LABELS, KNOWN, tmp_path / "as_is.pth", zoo)
    assert load_final(tmp_path / "as_is.pth", "grounding", LABELS).meta["prompts"] == list(TEXTS)
    published = torch.load(zoo / "own.pth", weights_only=True)["state_dict"]
    inference = PoolInference("grounding", tmp_path / "as_is.pth", LABELS, "cpu", zoo)
    assert all(torch.equal(value, published[name]) for name, value in inference.model.state_dict().items())
    found = list(inference.run(pool(images)))
    assert [len(one) for one in found] == [25, 25]
    for one in found:
        assert one.class_probs.shape == (25, 3) and not one.softmax and one.embeddings.shape == (25, 256)
        assert np.array_equal(one.class_probs[np.arange(25), one.class_indices], one.scores)
    # the same question in another order of the labels
    turned = LABELS[::-1]
    save_as_is("grounding", turned, KNOWN, tmp_path / "turned.pth", zoo)
    again = list(PoolInference("grounding", tmp_path / "turned.pth", turned, "cpu", zoo).run(pool(images)))
    assert again[0].class_probs.shape == (25, 3)


def test_another_prompt_gives_other_scores(zoo: Path, images: Path, tmp_path: Path) -> None:
    scores = []
    for prompt in ("small red crab", "boat", "small red crab"):
        save_as_is("grounding", ("c",), {"c": (prompt,)}, tmp_path / "as_is.pth", zoo)
        scores.append(
            next(PoolInference("grounding", tmp_path / "as_is.pth", ("c",), "cpu", zoo).run(pool(images))).scores
        )
    assert np.array_equal(scores[0], scores[2]) and not np.array_equal(scores[0], scores[1])


def test_a_training_follows_difficulty_and_keeps_its_prompts(zoo: Path, images: Path, tmp_path: Path) -> None:
    request = TrainRequest(
        "grounding", LABELS, images, None, tmp_path / "train", device="cpu", max_iterations=2, zoo_root=zoo, known=KNOWN
    )
    result = train(request)
    assert result.iterations == 2 and result.difficulty is not None and min(result.difficulty) < 1
    final = load_final(result.checkpoint, "grounding", LABELS)
    assert final.meta["prompts"] == list(TEXTS) and final.meta["vocabulary"] == VOCABULARY
    before = torch.load(zoo / "own.pth", weights_only=True)["state_dict"]
    assert {name: value.shape for name, value in before.items()} == {n: v.shape for n, v in final.state_dict.items()}
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, final.state_dict[name])}
    assert "decoder" in moved and not moved & {
        "language_model"
    }  # as mmdetection fine-tunes it: the encoder stands still
    found = next(PoolInference("grounding", result.checkpoint, LABELS, "cpu", zoo).run(pool(images)))
    assert found.class_probs.shape == (25, 3)
    # the next round starts from it, with a label more
    more = (*LABELS, "bar")
    again = replace(request, classes=more, init_weights=result.checkpoint, work_dir=tmp_path / "next", max_iterations=1)
    assert load_final(train(again).checkpoint, "grounding", more).meta["prompts"] == [*TEXTS, "bar"]


# --- prompts ----------------------------------------------------------------------------------------------


def test_a_prompt_is_the_attribute_or_what_people_read() -> None:
    found = known_by_prompt(("c", "sq", "disc"), {"c": "small red crab"}, {"sq": "square"})
    assert found.plain == {"c": ["small red crab"], "sq": ["square"], "disc": ["disc"]}
    assert found.sentences() == ["it looks for what the labels say: c as `small red crab`, sq as `square`, disc"]
    assert prompts_of(("c", "sq", "new"), found.plain) == ("small red crab", "square", "new")


@pytest.mark.parametrize(
    ("label", "prompt"),
    [
        ("crab_(small)", "crab small"),
        ("St. Bernard", "St Bernard"),
        ("what?", "what"),
        ("a\n b", "a b"),
        ("[SEP]", "SEP"),
        ("Öl-Fass & co", "Öl-Fass & co"),
    ],
)
def test_what_would_end_a_prompt_becomes_a_blank(label: str, prompt: str) -> None:
    assert prompts_of((label,), {}) == (prompt,)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ("fish", "(?)"),
            r"expected words in the prompt of the label '\(\?\)', got '\(\?\)'; set it in the labeling config",
        ),
        (
            ("red crab", "Red_Crab"),
            r"expected a prompt of its own .* 'Red Crab' for 'red crab' and for 'Red_Crab'; give one",
        ),
    ],
)
def test_labels_without_a_prompt_of_their_own_are_refused(labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(DetectorError, match=message):
        prompts_of(labels, {})


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("crab", "🐟"), r"expected words that the text encoder knows in the prompt '🐟', got none; say it in English"),
        (("crab", "cráb"), r"expected a prompt of its own for every label, got 'crab' for 'crab' and for 'cráb'"),
        (
            tuple(f"{'red ' * n}crab" for n in range(22)),
            r"expected prompts of at most 256 tokens together, got 277 for 22 labels .* set it in the labeling config",
        ),
    ],
)
def test_prompts_that_the_text_encoder_cannot_take_are_refused(zoo: Path, texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(DetectorError, match=message):
        build_config(find_entry("grounding", zoo), texts, prompts=Prompts(texts, VOCABULARY))


def test_a_hundred_labels_of_a_word_fit_and_the_limit_is_told() -> None:
    words = [f"w{number}" for number in range(200)]
    vocabulary = VOCABULARY + "\n".join(words) + "\n"
    entry = find_entry("mm_grounding_dino_t")
    config = build_config(entry, words[:100], prompts=Prompts(tuple(words[:100]), vocabulary))
    assert len(config.test_pipeline[-2]["texts"]) == 100
    assert len(build_config(entry, words[:127], prompts=Prompts(tuple(words[:127]), vocabulary)).classes) == 127
    with pytest.raises(DetectorError, match=r"at most 256 tokens together, got 258 for 128 labels .* reads no prompts"):
        build_config(entry, words[:128], prompts=Prompts(tuple(words[:128]), vocabulary))


def test_pipelines_hand_prompts_over_and_need_no_hub() -> None:
    config = build_config(find_entry("mm_grounding_dino_t"), LABELS, train_images=4, prompts=Prompts(TEXTS, VOCABULARY))
    for steps in (config.train_pipeline, config.test_pipeline):
        assert steps[-2] == {"type": "AddPrompts", "texts": list(TEXTS)}
        assert {"text", "custom_entities"} <= set(steps[-1]["meta_keys"])
    assert "tokenizer" not in str(config.train_pipeline) and config.model.language_model.type == "PromptEncoder"
    assert config.model.bbox_head.num_classes == 256 and config.model.encoder.num_cp == 0


# --- what is missing --------------------------------------------------------------------------------------


def test_without_the_package_it_is_told_what_to_install(
    zoo: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    advice = r"expected the package transformers, .* found none; .* pip install 'ppal-backend\[grounding\]'"
    with pytest.raises(DetectorError, match=advice):
        save_as_is("grounding", LABELS, KNOWN, tmp_path / "as_is.pth", zoo)
    with pytest.raises(DetectorError, match=advice):
        train(TrainRequest("grounding", LABELS, images, None, tmp_path / "t", device="cpu", zoo_root=zoo, known=KNOWN))
    assert "pip install" in weights_problem(find_entry("grounding", zoo))
    assert weights_problem(find_entry("retinanet_tiny")) == ""


def test_without_a_vocabulary_in_the_zoo_it_is_refused(zoo: Path) -> None:
    missing = r"expected the vocabulary of a text encoder, .* a table 'vocabulary'"
    with isolated("test-prompts"), pytest.raises(DetectorError, match=missing):
        build_model(build_config(find_entry("mm_grounding_dino_t"), LABELS))
    with pytest.raises(WeightsUnavailable, match="retinanet_tiny has no vocabulary in the zoo"):
        vocabulary_file(find_entry("retinanet_tiny"))
    with pytest.raises(DetectorError, match="expected a detector with a language_model"):
        build_config(find_entry("retinanet_tiny"), LABELS, prompts=Prompts(TEXTS, VOCABULARY))
    with pytest.raises(DetectorError, match=r"expected \?, \[MASK\] in the vocabulary, got none; use that of BERT"):
        tokenizer_of("[PAD]\n[UNK]\n[CLS]\n[SEP]\n.\ncrab\n")


def test_the_vocabulary_is_put_in_place_by_hand_as_weights_are(zoo: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(VOCABULARY.encode()).hexdigest()
    entry = find_entry("grounding", zoo)
    assert entry.vocabulary is not None
    url = "http://127.0.0.1:9/vocab.txt"
    entry = replace(entry, vocabulary=replace(entry.vocabulary, path=None, url=url))
    assert "the word pieces of grounding cannot be had: there is no file" in weights_problem(entry, tmp_path)
    with pytest.raises(WeightsUnavailable, match=r"the word pieces of grounding could not .* ppal zoo fetch .* does$"):
        vocabulary_file(entry, tmp_path)
    (tmp_path / "mine.txt").write_text(VOCABULARY)
    placed = place_weights(entry, tmp_path / "mine.txt", tmp_path)
    assert placed == vocabulary_file(entry, tmp_path) == tmp_path / f"vocabulary-{digest[:8]}.txt"
    assert weights_problem(entry, tmp_path) == ""
    assert weights_file(entry, tmp_path) == zoo / "own.pth"
    placed.write_text("others")
    with pytest.raises(WeightsUnavailable, match=r"word pieces of grounding at .* have sha256 .*, expected"):
        vocabulary_file(entry, tmp_path)


def test_the_published_files_are_named_whole() -> None:
    entry = find_entry("mm_grounding_dino_t")
    assert entry.weights is not None and entry.vocabulary is not None
    assert entry.weights.kind == "detector" and entry.weights.classes == ()
    assert len(entry.vocabulary.sha256) == 64


def test_it_says_that_it_cannot_be_exported(zoo: Path, tmp_path: Path) -> None:
    save_as_is("grounding", LABELS, KNOWN, tmp_path / "as_is.pth", zoo)
    with pytest.raises(UnsupportedHead, match="grounding cannot be exported"):
        export_model("grounding", tmp_path / "as_is.pth", LABELS, tmp_path / "out.pt", "torchscript", zoo_root=zoo)
