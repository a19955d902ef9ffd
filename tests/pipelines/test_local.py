"""What the containers of a run on this machine see of it."""

from pathlib import Path

from pipelines.local import host_paths


def test_containers_see_what_arguments_and_variables_name_and_write_what_they_must(
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    names = ("work/scenes", "model", "images", "key.json", "hub", "store/mlflow.db")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    scenes, model, images, key, hub, store = (str(tmp_path / name) for name in names)
    arguments = {
        "data_dataset": scenes,
        "data_output": "gs://bucket/data",
        "caption_images": images,
        "train_candidates": [{"name": "a", "init_from": model}, {"name": "/nowhere"}],
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
