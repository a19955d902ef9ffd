"""A run on this machine: what its containers see, and how a failed step is shown."""

import io
from pathlib import Path

import pytest
from kfp import dsl

from model_lib.errors import WorkError
from pipelines.forking import forked_steps
from pipelines.local import REACHED, _Log, host_paths, run_locally


@dsl.component(base_image="python", install_kfp_package=False)
def fail(how: str) -> None:
    import os
    import signal

    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "defect":
        raise KeyError("no such thing")
    print("captioner: failed: the bucket is away")
    raise SystemExit(1)


@dsl.component(base_image="python", install_kfp_package=False)
def look(name: str) -> None:
    import os
    import sys

    print(name, "has torch" if "torch" in sys.modules else "imports", os.environ["CAPTIONER_MARK"])


@dsl.pipeline(name="looking")
def looking() -> None:
    with dsl.ParallelFor(["a", "b", "c"]) as name:
        look(name=name)


@dsl.pipeline(name="failing")
def failing(how: str) -> None:
    fail(how=how)


def test_steps_side_by_side_are_forked_with_their_imports_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    with forked_steps():
        monkeypatch.setenv("CAPTIONER_MARK", "of this run")
        run_locally(looking, {}, tmp_path, "subprocess")
        with pytest.raises(WorkError, match="step fail failed: it was killed"):
            run_locally(failing, {"how": "killed"}, killed, "subprocess")
    lines = (tmp_path / "pipeline.log").read_text()
    assert all(f"{name} has torch of this run" in lines for name in "abc")


def test_a_run_says_how_long_is_left(capsys: pytest.CaptureFixture) -> None:
    log = _Log(io.StringIO(), REACHED)
    log.started -= 100  # seconds ago
    log.write("    train slow: 1,000/2,000 steps, 9 a second\n    train quick: 9/9 steps\n")
    log.write("    Executing task 'register'\n")
    slow, quick, register = capsys.readouterr().err.splitlines()
    # Half of the training is 45 % of all, and register begins at 93 %.
    assert slow.endswith("9 a second; the whole run: about 122 s left")
    assert quick.endswith("the whole run: about 122 s left")
    assert register.endswith("step register; the whole run: about 8 s left")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("reason", r"^the bucket is away$"),
        ("defect", r"^step fail failed: KeyError: 'no such thing'; .*pipeline\.log has all that"),
        ("killed", r"^step fail failed: it was killed, or says nothing; .*pipeline\.log has all"),
    ],
)
def test_a_failed_steps_own_line_is_shown(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=message):
        run_locally(failing, {"how": how}, tmp_path, "subprocess")


def test_containers_see_what_arguments_and_variables_name_and_write_what_they_must(
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    names = ("work/scenes", "model", "images", "key.json", "hub", "store/mlflow.db")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    scenes, model, images, key, hub, store = (str(tmp_path / name) for name in names)
    arguments = {
        "data": scenes,
        "output": "gs://bucket/out",
        "caption_images": images,
        "candidates": [{"name": "a", "init_from": model}, {"name": "/nowhere"}],
    }
    environment = {
        "GOOGLE_APPLICATION_CREDENTIALS": key,
        "HF_HOME": hub,
        "MLFLOW_TRACKING_URI": f"sqlite:///{store}",
        "AWS_REGION": "eu",
    }
    read, written = (images, model, key), (hub, f"{tmp_path}/store")
    expected = {**dict.fromkeys(read, True), **dict.fromkeys(written, False)}
    assert host_paths(arguments, environment, work) == expected
