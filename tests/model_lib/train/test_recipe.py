"""The parts of the recipe: how captions are written, what the tower sees, and what learns how
fast."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model_lib import Captioner, UserError
from model_lib.data.captions import in_style
from model_lib.data.shards import read_manifest
from model_lib.model.tokens import decode_tokens
from model_lib.train.build import build_model
from model_lib.train.config import ResolvedConfig, TrainConfig, resolve
from model_lib.train.data import TrainData
from model_lib.train.distributed import World
from model_lib.train.loss import CrossEntropyObjective
from model_lib.train.step import TrainStep, make_optimizer
from tests.helpers.small import pixels, save_parts, small_model

CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: Path) -> dict[str, str]:
    vision, decoder = save_parts(tmp_path_factory.mktemp("parts"), gpt2_tokenizer)
    return {"vision": str(vision), "decoder": str(decoder)}


def config(data: Path | str = "d", **options: Any) -> ResolvedConfig:
    return resolve(TrainConfig(data=str(data), output="o", **options))


@pytest.mark.parametrize(
    ("text", "styled"),
    [
        ("A man  on a horse.", "a man on a horse"),
        ("Two dogs . ", "two dogs"),
        ("It says 3.5 km.", "it says 3.5 km"),
        ("Ein HUND...", "ein hund"),
    ],
)
def test_captions_are_learned_as_they_are_scored(text: str, styled: str) -> None:
    assert in_style(text, "coco") == styled
    assert in_style(text, "raw") == text


def test_captions_are_learned_in_their_style(data: Path, parts: dict[str, str]) -> None:
    for options, style in (({}, "raw"), ({"caption_style": "coco"}, "coco")):
        resolved = config(data, **parts, **options)
        manifest = read_manifest(str(data))
        model = build_model(resolved, manifest)
        learned = TrainData(resolved, manifest, model, CPU)
        raw = learned.reader.captions()
        assert learned.captions == [[in_style(text, style) for text in texts] for texts in raw]
        text = decode_tokens(model.tokenizer, learned.ids[0][0])
        assert text == in_style(raw[0][0], style)


def test_a_squashed_image_is_seen_whole_also_by_the_saved_model(
    data: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    image = Image.new("RGB", (400, 100), "white")
    image.paste("red", (0, 0, 60, 100))  # outside of the centre
    manifest = read_manifest(str(data))
    for options, is_seen in (({}, False), ({"resize": "squash"}, True)):
        model = build_model(config(data, **parts, **options), manifest)
        view = model.preprocess(image)
        assert view.shape == (3, 32, 32) and bool((view[1] < 20).any()) == is_seen
    model.save_pretrained(tmp_path)
    loaded = Captioner.from_pretrained(str(tmp_path))
    assert np.array_equal(loaded.preprocess(image), view)
    going_on = build_model(config(data, init_from=str(tmp_path)), manifest)
    assert going_on.config.image_stretch, "a trained model keeps its own"


def test_new_weights_may_learn_faster_than_pretrained_ones(
    data: Path, parts: dict[str, str]
) -> None:
    resolved = config(data, **parts, unfreeze_vision=1, pretrained_learning_rate=2e-5)
    model = build_model(resolved, read_manifest(str(data)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    peaks = {
        names[id(parameter)]: group["peak"]
        for group in make_optimizer(model, resolved).param_groups
        for parameter in group["params"]
    }
    assert peaks["decoder.h.0.crossattention.c_attn.weight"] == resolved.learning_rate
    assert peaks["decoder.h.0.ln_visual.bias"] == resolved.learning_rate
    for name in ("decoder.h.1.mlp.c_fc.weight", "decoder.h.0.ln_2.weight", "head.weight"):
        assert peaks[name] == resolved.pretrained_learning_rate < resolved.learning_rate
    assert peaks["vision.encoder.layers.1.mlp.fc1.weight"] == resolved.vision_learning_rate
    assert not [name for name in peaks if name.startswith("vision.encoder.layers.0.")]
    assert "decoder.h.0.attn.c_attn.weight" not in peaks


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_towers_last_layers_are_trained_if_they_are_unfrozen(precision: str) -> None:
    model = small_model()
    model.config.trained_vision_layers = 1
    model.freeze()
    objective = CrossEntropyObjective([[[5, 6, 0]], [[7, 0]]], model.start_token)
    step = TrainStep(model, objective, config(unfreeze_vision=1, precision=precision), CPU, 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step.run(np.arange(2), pixels(model, 2), 5)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    last = "vision.encoder.layers.1."
    assert {n for n in moved if n.startswith("vision.")} == {n for n in before if last in n}


def test_more_layers_than_there_are_are_refused(data: Path, parts: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"unfreeze_vision: 3 layers are more than the .* 2"):
        build_model(config(data, **parts, unfreeze_vision=3), read_manifest(str(data)))
    with pytest.raises(UserError, match=r"unfreeze_vision: 2 layers are more than the .* 1"):
        options = {**parts, "vision_layer": -2, "unfreeze_vision": 2}
        build_model(config(data, **options), read_manifest(str(data)))
    with pytest.raises(UserError, match="trained whole from scratch"):
        config(preset="tiny", unfreeze_vision=1)
