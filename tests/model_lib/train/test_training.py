"""Training: what one step learns from, its options, and which model is kept."""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from model_lib import Captioner, UserError
from model_lib.data.shards import read_manifest
from model_lib.model import decoder
from model_lib.model.captioner import Captioner as Model
from model_lib.model.decoder import Block
from model_lib.model.precision import autocast_dtype
from model_lib.presets import PRESETS
from model_lib.train.build import build_model
from model_lib.train.config import TrainConfig
from model_lib.train.learning import Learner, learning_rate, make_optimizer
from model_lib.train.objectives import CrossEntropyObjective, Targets
from model_lib.train.training import train


def config(data: Path, output: Path, **options: object) -> TrainConfig:
    return TrainConfig(
        **{"data": str(data), "output": str(output), "preset": "tiny", "epochs": 2, **options}
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Captioner.from_pretrained(str(folder / "best"), device="cpu").state_dict()


def test_learning_rate_rises_then_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[55] == pytest.approx(0.5) and rates[-1] < 0.001
    assert all(earlier >= later for earlier, later in pairwise(rates[9:]))


def test_norms_and_biases_do_not_decay(model: Model, data: Path, tmp_path: Path) -> None:
    optimizer = make_optimizer(model, config(data, tmp_path, weight_decay=0.5))
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.5) for p in group["params"])


def evaluated(monkeypatch: pytest.MonkeyPatch, *scores: tuple[float, float]) -> None:
    """Let validations find these losses and CIDErs, one after another."""
    found = iter(scores)

    def measure(*_: object) -> dict[str, float]:
        loss, cider = next(found)
        return {"val_loss": loss, "val_slice_CIDEr": cider}

    monkeypatch.setattr("model_lib.train.validation.Validator.measure", measure)


def kept(folder: Path) -> int:
    """Return the step of the best model."""
    return int(json.loads((folder / "best" / "training.json").read_text())["step"])


def test_the_best_model_is_kept_self_contained(finished: Path) -> None:
    about = json.loads((finished / "best" / "training.json").read_text())
    assert about["configuration"]["preset"] == "tiny"
    model = Captioner.from_pretrained(str(finished / "best"), device="cpu")
    assert len(model.caption([Image.new("RGB", (80, 64), "white")])) == 1


def test_the_model_of_the_best_cider_is_kept_and_among_equals_that_of_the_lowest_loss(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(monkeypatch, (3.0, 0.1), (2.0, 0.1), (1.0, 0.05))
    trained = train(config(data, tmp_path, epochs=3))
    assert (trained.validation_loss, trained.validation_cider, kept(tmp_path)) == (2.0, 0.1, 4)


def test_training_stops_early_when_validations_get_no_better(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(monkeypatch, (3.0, 0.1), (2.0, 0.3), (1.0, 0.2), (1.0, 0.2), (1.0, 0.9))
    options = {"epochs": 3, "validate_every": 1, "patience": 2}
    assert train(config(data, tmp_path, **options)).steps == 4
    assert train(config(data, tmp_path, **options)).steps == 4, "it stays finished"
    assert kept(tmp_path) == 2


def test_validations_come_each_so_many_steps_and_at_the_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(monkeypatch, (3.0, 0.1), (2.0, 0.2), (1.0, 0.3))
    train(config(data, tmp_path, epochs=2, batch_size=13, validate_every=4))
    assert kept(tmp_path) == 10


def test_a_start_of_another_kind_or_with_parts_besides_is_refused(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    start = str(finished / "best")
    with pytest.raises(
        UserError, match=r"best: was trained from scratch, .* preset clip-l-gpt2-medium does not do"
    ):
        train(TrainConfig(data=str(data), output=str(tmp_path), init_from=start))
    with pytest.raises(
        UserError, match="start: a trained captioner has its own vision, decoder and tokenizer"
    ):
        TrainConfig(data=str(data), output=str(tmp_path), init_from=start, vision="clip")
    with pytest.raises(UserError, match=r"dropout: 1\.0 is not less than 1"):
        config(data, tmp_path, dropout=1.0)


def test_another_start_in_the_same_place_is_another_run(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "best", tmp_path / "start")
    go_on = config(data, tmp_path / "run", epochs=1, init_from=str(tmp_path / "start"))
    train(go_on)
    shutil.rmtree(tmp_path / "start")
    shutil.copytree(tmp_path / "run" / "best", tmp_path / "start")
    with pytest.raises(UserError, match="holds a run with other options or data"):
        train(go_on)


@pytest.mark.parametrize("options", [{"micro_batch_size": 5}, {"recompute": True}])
def test_what_saves_memory_changes_rounding_alone(
    data: Path, tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(data, tmp_path / "whole", epochs=1))
    learned, again, sizes, layers = (
        CrossEntropyObjective.make_targets,
        decoder.checkpoint,
        list[int](),
        list[object](),
    )

    def note(
        objective: CrossEntropyObjective,
        model: Captioner,
        features: Tensor,
        numbers: Sequence[int],
        step: int,
    ) -> Targets:
        sizes.append(len(numbers))
        return learned(objective, model, features, numbers, step)

    monkeypatch.setattr(CrossEntropyObjective, "learned", note)
    monkeypatch.setattr(
        decoder, "checkpoint", lambda *given, **how: layers.append(given[0]) or again(*given, **how)
    )
    saving = train(config(data, tmp_path / "saving", epochs=1, **options))
    assert max(sizes) == options.get("micro_batch_size", 32) and bool(layers) == (
        "recompute" in options
    )
    assert saving.validation_loss == pytest.approx(whole.validation_loss, rel=1e-4)


@pytest.mark.soak
def test_compiled_layers_compute_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU (apt-get install g++)")
    whole = train(config(data, tmp_path / "whole", epochs=1))
    layers, compiling = list[object](), Block.compile
    monkeypatch.setattr(
        Block, "compile", lambda block, **how: layers.append(block) or compiling(block, **how)
    )
    compiled = train(config(data, tmp_path / "compiled", epochs=1, compile=True))
    assert len(layers) == PRESETS["tiny"].decoder_shape["n_layer"]
    assert compiled.validation_loss == pytest.approx(whole.validation_loss, rel=1e-3)


# The losses of the first steps on the generated scenes, as `captioner train --preset tiny` had them
# on 2026-11-23.
GOLDEN = [6.01724, 5.58503, 5.19671, 5.16695, 4.92356, 4.75261, 4.60957, 4.52771]


def test_the_losses_are_the_golden_ones(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    step = Learner.learn

    def keep(learner: Learner, *batch: object) -> dict:
        measured = step(learner, *batch)
        losses.append(float(measured["train_loss"]))
        return measured

    monkeypatch.setattr("model_lib.train.learning.Learner.learn", keep)
    train(config(data, tmp_path, epochs=4))
    assert losses == pytest.approx(GOLDEN, rel=1e-3)


def test_clipping_bounds_the_gradient(data: Path, tmp_path: Path) -> None:
    options = {"clip_norm": 0.0, "weight_decay": 0.0}
    train(config(data, tmp_path, **options))
    torch.manual_seed(0)
    untrained = build_model(config(data, tmp_path), read_manifest(str(data))).state_dict()
    assert all(torch.equal(weight, untrained[name]) for name, weight in weights(tmp_path).items())


def test_training_again_gives_the_same_weights(finished: Path, data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path, epochs=3, workers=1))
    ours, theirs = weights(tmp_path), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_is_not_trained_again(finished: Path, data: Path) -> None:
    def times() -> dict[Path, int]:
        made = (file for file in finished.rglob("*") if file.is_file() and file.name != ".lock")
        return {file: file.stat().st_mtime_ns for file in made}

    before = times()
    assert train(config(data, finished, epochs=3)).steps == 6
    assert times() == before


def test_an_output_with_other_options_is_refused(finished: Path, data: Path) -> None:
    with pytest.raises(UserError, match="holds a run with other options"):
        train(config(data, finished, epochs=3, learning_rate=0.5))


def test_training_lowers_the_loss(data: Path, tmp_path: Path) -> None:
    short = train(config(data, tmp_path / "short", epochs=1))
    longer = train(config(data, tmp_path / "longer", epochs=15))
    assert longer.validation_loss < 0.6 * short.validation_loss


def test_bfloat16_is_near_float32(data: Path, tmp_path: Path) -> None:
    losses = [
        train(config(data, tmp_path / kind, precision=kind, epochs=1)).validation_loss
        for kind in ("float32", "bfloat16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


def test_captions_longer_than_the_model_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="max_tokens: 64 leaves no place for the end in 64 positions"
    ):
        train(config(data, tmp_path, max_tokens=64))
    assert train(config(data, tmp_path, epochs=1, max_tokens=63)).steps == 2


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="float16"):
        autocast_dtype("float16", torch.device("cpu"))


def test_the_tokenizer_of_a_model_from_scratch_knows_the_captions(
    data: Path, tmp_path: Path
) -> None:
    model = build_model(config(data, tmp_path), read_manifest(str(data)))
    text = "a small red circle on a white background"
    ids = model.tokenizer(text)["input_ids"]
    assert len(ids) < 12 and model.tokenizer.decode(ids) == text
    assert model.tokenizer.decode(model.tokenizer("Ünïcödé \n")["input_ids"]) == "Ünïcödé \n"


def test_data_without_validation_images_is_refused(scenes: Path, tmp_path: Path) -> None:
    from model_lib.ingest.config import IngestConfig
    from model_lib.ingest.ingesting import ingest

    annotations, images = scenes / "annotations" / "captions_train2017.json", scenes / "train2017"
    ingest(
        IngestConfig(
            annotations=str(annotations),
            images=str(images),
            split="train",
            output=str(tmp_path / "d"),
        )
    )
    with pytest.raises(UserError, match="has no val images"):
        train(config(tmp_path / "d", tmp_path / "out"))
