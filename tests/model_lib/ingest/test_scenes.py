"""Generated scenes: reproducible, with combinations held out, and learnable: a tiny model really
looks at them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.ingest.config import IngestConfig, ScenesConfig
from model_lib.ingest.hard_scenes import HELD_OUT as HARD_HELD_OUT
from model_lib.ingest.ingesting import ingest
from model_lib.ingest.scenes import HELD_OUT, make_scenes
from model_lib.train.config import TrainConfig, Trained
from model_lib.train.training import train


def captions(folder: Path, split: str) -> list[list[str]]:
    """Return each image's captions."""
    document = json.loads((folder / "annotations" / f"captions_{split}2017.json").read_text())
    captions_of: dict[int, list[str]] = {}
    for note in document["annotations"]:
        captions_of.setdefault(note["image_id"], []).append(note["caption"])
    return list(captions_of.values())


def test_each_image_has_five_captions_and_held_out_combinations_are_in_validation_alone(
    scenes: Path,
) -> None:
    held_out = [f"{size} {colour} {shape}" for size, colour, shape in HELD_OUT]
    assert len(held_out) == 16
    for split, count in (("train", 64), ("val", 12)):
        images = captions(scenes, split)
        assert [len(set(texts)) for texts in images] == [5] * count
        for texts in images:
            shown = any(words in text for words in held_out for text in texts)
            assert shown == (split == "val"), texts


def test_the_same_seed_draws_the_same_set_and_another_another(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_scenes(ScenesConfig(output=str(tmp_path / name), train=5, val=2, seed=seed))
    files = [
        {f.relative_to(tmp_path / n): f.read_bytes() for f in (tmp_path / n).rglob("*.*")}
        for n in "abc"
    ]
    assert files[0] == files[1] != files[2]
    assert Image.open(tmp_path / "a" / "train2017" / "000000000001.jpg").size == (128, 128)


def test_a_smaller_set_leaves_nothing_of_a_larger_one(tmp_path: Path) -> None:
    for count in (6, 3):
        make_scenes(ScenesConfig(output=str(tmp_path), train=count, val=2))
    assert len(list((tmp_path / "train2017").iterdir())) == 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    """The demo's own data, and its model trained on two captions per image, which takes half as
    long as on five."""
    folder = tmp_path_factory.mktemp("demo")
    make_scenes(ScenesConfig(output=str(folder / "scenes")))
    ingest(IngestConfig(dataset=str(folder / "scenes"), output=str(folder / "data")))
    options = {"preset": "tiny", "epochs": 5, "captions_per_image": 2}
    return folder / "data", train(
        TrainConfig(data=str(folder / "data"), output=str(folder / "out"), **options)
    )


@pytest.mark.soak
def test_a_tiny_model_learns_to_look_at_unseen_combinations(
    demo: tuple[Path, Trained], tmp_path: Path
) -> None:
    """Its true CIDEr is at least three times that of shuffled images."""
    data, trained = demo
    evaluated = evaluate(EvaluateConfig(model=trained.model, data=str(data), output=str(tmp_path)))
    assert evaluated.scores["CIDEr"] >= 3 * evaluated.shuffled_cider, (
        evaluated.scores,
        evaluated.shuffled_cider,
    )


@pytest.mark.soak
def test_self_critical_training_raises_the_cider_of_unseen_combinations(
    demo: tuple[Path, Trained], tmp_path: Path
) -> None:
    data, first = demo
    stage = {"epochs": 1, "objective": "self-critical", "init_from": first.model}
    second = train(TrainConfig(data=str(data), output=str(tmp_path), preset="tiny", **stage))
    assert second.validation_cider > first.validation_cider


def test_hard_scenes_hold_combinations_out_and_use_the_whole_image(tmp_path: Path) -> None:
    config = ScenesConfig(output=str(tmp_path), train=60, val=30, hard=True, size=96)
    make_scenes(config)
    held_out = [f"{colour} {shape}" for colour, shape in HARD_HELD_OUT]
    for split, count in (("train", 60), ("val", 30)):
        images = captions(tmp_path, split)
        assert [len(set(texts)) for texts in images] == [5] * count
        shown = [any(words in text for words in held_out for text in texts) for texts in images]
        assert all(shown) if split == "val" else not any(shown)
        assert len({texts[0] for texts in images}) > 0.9 * count
    files = sorted((tmp_path / "train2017").iterdir())
    assert {Image.open(file).size for file in files} == {(128, 96)}
    edge = [np.asarray(Image.open(file))[:, :16].reshape(-1, 3).std(0).max() for file in files]
    assert sum(spread > 20 for spread in edge) > 10, "the centre crop would lose nothing"
