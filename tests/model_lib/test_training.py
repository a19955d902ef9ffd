"""Training: what one step learns from, that a killed run goes on as if nothing had happened, and what is kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from model_lib import Captioner, UserError, checkpoint
from model_lib.config import TrainConfig
from model_lib.errors import WorkError
from model_lib.loss import caption_loss
from model_lib.model import Captioner as Model
from model_lib.precision import autocast_dtype
from model_lib.shards import read_manifest
from model_lib.tokens import IGNORED, encode_captions
from model_lib.training import build_model, learning_rate, make_optimizer, train
from tests.model_lib.test_model import pixels


def config(data: Path, output: Path, **options: object) -> TrainConfig:
    return TrainConfig(**{"data": str(data), "output": str(output), "preset": "tiny", "epochs": 2, **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Captioner.from_pretrained(str(folder / "best"), device="cpu").state_dict()


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    train(config(data, folder, epochs=3))
    return folder


def test_loss_is_cross_entropy_of_every_token_and_no_padding(model: Model) -> None:
    captions = [["a red circle", "two blue squares on a white background"], ["a red circle on a white background"]]
    tokens, targets = encode_captions(model.tokenizer, captions, per_picture=5, max_tokens=40)
    total, count = caption_loss(model, pixels(model, 2), tokens, targets)
    one_by_one, length = 0.0, 0
    for picture, texts in enumerate(captions):
        for text in texts:
            ids = torch.tensor([0, *model.tokenizer(text)["input_ids"], 0])
            logits = model(pixels(model, 2)[picture : picture + 1], ids[:-1].reshape(1, 1, -1))[0, 0]
            one_by_one += float(torch.nn.functional.cross_entropy(logits.detach(), ids[1:], reduction="sum"))
            length += len(ids) - 1
    assert int(count) == length
    assert total.item() == pytest.approx(one_by_one, rel=1e-5)


def test_the_picture_is_encoded_once_for_all_its_captions(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda x, **k: seen.append(x.shape[0]) or forward(x, **k))
    tokens = torch.randint(0, 200, (2, 5, 6))
    caption_loss(model, pixels(model, 2), tokens, tokens)
    assert seen == [2]


def test_long_captions_are_cut_and_short_ones_end(model: Model) -> None:
    tokens, targets = encode_captions(model.tokenizer, [["a red circle on a white background", "a"]], 5, max_tokens=3)
    assert tokens.shape == (1, 2, 3) and tokens[0, 0, 0] == 0
    assert 0 not in targets[0, 0].tolist()
    assert targets[0, 1].tolist()[1:] == [0, IGNORED]


def test_learning_rate_rises_then_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[55] == pytest.approx(0.5) and rates[-1] < 0.001
    assert all(earlier >= later for earlier, later in pairwise(rates[9:]))


def test_norms_and_biases_do_not_decay(model: Model, data: Path, tmp_path: Path) -> None:
    optimizer = make_optimizer(model, config(data, tmp_path, weight_decay=0.5), torch.device("cpu"))
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.5) for p in group["params"])


def test_the_best_model_by_validation_loss_is_kept_self_contained(finished: Path) -> None:
    about = json.loads((finished / "best" / "training.json").read_text())
    assert about["configuration"]["preset"] == "tiny"
    model = Captioner.from_pretrained(str(finished / "best"), device="cpu")
    assert len(model.caption([Image.new("RGB", (80, 64), "white")])) == 1


def test_a_worse_epoch_does_not_replace_the_best(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr("model_lib.training._Run._validate", lambda run: next(losses))
    assert train(config(data, tmp_path, epochs=3)).validation_loss == 2.0
    assert json.loads((tmp_path / "best" / "training.json").read_text())["step"] == 4


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, float("nan")])
    monkeypatch.setattr("model_lib.training._Run._validate", lambda run: next(losses))
    with pytest.raises(WorkError, match="validation loss is nan after step 4"):
        train(config(data, tmp_path, epochs=3))
    assert json.loads((tmp_path / "best" / "training.json").read_text())["validation_loss"] == 3.0


def test_a_kill_before_the_validation_leaves_it_to_the_resumed_run(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("model_lib.training._Run._validate", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path, epochs=3, checkpoint_minutes=0))
    assert checkpoint.read_state(checkpoint.newest(str(tmp_path)) or "")["step"] == 2
    train(config(data, tmp_path, epochs=3))
    ours, theirs = weights(tmp_path), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_clipping_bounds_the_gradient(data: Path, tmp_path: Path) -> None:
    options = {"clip_norm": 0.0, "weight_decay": 0.0}
    train(config(data, tmp_path, **options))
    torch.manual_seed(0)
    untrained = build_model(config(data, tmp_path), read_manifest(str(data))).state_dict()
    assert all(torch.equal(weight, untrained[name]) for name, weight in weights(tmp_path).items())


def test_half_written_checkpoints_never_push_out_whole_ones(finished: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    for step in (7, 8, 9):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir()
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")
    newest = checkpoint.newest(str(tmp_path))
    assert newest is not None and newest.endswith("step-00000006")
    model = build_model(config(data, tmp_path), read_manifest(str(data)))
    optimizer = make_optimizer(model, config(data, tmp_path), torch.device("cpu"))
    checkpoint.save(str(tmp_path), 5, model, optimizer, {"step": 5})
    names = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"] and checkpoint.newest(str(tmp_path)) == newest


@pytest.mark.gpu
def test_resuming_on_a_gpu_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    for kind in ("bfloat16", "float16"):
        options = {"device": "cuda", "precision": kind, "checkpoint_minutes": 0.0}
        with monkeypatch.context() as patched:
            patched.setattr("model_lib.training._Run._save_best", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                train(config(data, tmp_path / kind, **options))
        assert train(config(data, tmp_path / kind, **options)).steps == 4


def test_training_again_gives_the_same_weights(finished: Path, data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path, epochs=3, workers=1))
    ours, theirs = weights(tmp_path), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_is_not_trained_again(finished: Path, data: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    assert train(config(data, finished, epochs=3)).steps == 6
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before


def test_killed_and_started_again_it_ends_the_same(finished: Path, data: Path, tmp_path: Path) -> None:
    options = ["--data", data, "--output", tmp_path / "run", "--preset", "tiny", "--epochs", "3"]
    command = [sys.executable, "-m", "model_lib", "train", *map(str, options), "--checkpoint_minutes", "0"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    run = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    steps = [checkpoint.read_state(str(file.parent))["step"] for file in tmp_path.glob("run/checkpoints/*/state.json")]
    assert steps and max(steps) < 6, "the run was over before it could be killed"
    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "resuming candidate at step" in again.stderr
    ours, theirs = weights(tmp_path / "run"), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_damaged_checkpoint_is_passed_over(finished: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    file = newest / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-7] + b"damaged")
    assert checkpoint.newest(str(tmp_path / "run")) != str(newest)
    train(config(data, tmp_path / "run", epochs=3))
    ours, theirs = weights(tmp_path / "run"), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_output_with_other_options_is_refused(finished: Path, data: Path) -> None:
    with pytest.raises(UserError, match="holds a run with other options"):
        train(config(data, finished, epochs=3, learning_rate=0.5))


def test_training_lowers_the_loss(data: Path, tmp_path: Path) -> None:
    short = train(config(data, tmp_path / "short", epochs=1))
    longer = train(config(data, tmp_path / "longer", epochs=15))
    assert longer.validation_loss < 0.6 * short.validation_loss


def test_bfloat16_is_near_float32(data: Path, tmp_path: Path) -> None:
    losses = [train(config(data, tmp_path / kind, precision=kind)).validation_loss for kind in ("float32", "bfloat16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


def test_captions_longer_than_the_model_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_tokens: 65 is more than the model's 64 positions"):
        train(config(data, tmp_path, max_tokens=65))


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="float16"):
        autocast_dtype("float16", torch.device("cpu"))


def test_the_tokenizer_of_a_model_from_scratch_knows_the_captions(data: Path, tmp_path: Path) -> None:
    model = build_model(config(data, tmp_path), read_manifest(str(data)))
    text = "a small red circle on a white background"
    ids = model.tokenizer(text)["input_ids"]
    assert len(ids) < 12 and model.tokenizer.decode(ids) == text
    assert model.tokenizer.decode(model.tokenizer("Ünïcödé \n")["input_ids"]) == "Ünïcödé \n"


def test_data_without_validation_pictures_is_refused(scenes: Path, tmp_path: Path) -> None:
    from model_lib.config import IngestConfig
    from model_lib.ingest import ingest

    annotations, images = scenes / "annotations" / "captions_train2017.json", scenes / "train2017"
    ingest(IngestConfig(annotations=str(annotations), images=str(images), split="train", output=str(tmp_path / "d")))
    with pytest.raises(UserError, match="has no val pictures"):
        train(config(tmp_path / "d", tmp_path / "out"))
