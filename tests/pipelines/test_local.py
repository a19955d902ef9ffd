"""A run on this machine: what its containers see, and how a failed step is shown."""

from pathlib import Path

import pytest
from kfp import dsl

from model_lib.errors import WorkError
from pipelines.local import host_paths, run_locally


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


@dsl.pipeline(name="failing")
def failing(how: str) -> None:
    fail(how=how)


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
