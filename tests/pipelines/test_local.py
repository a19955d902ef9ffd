"""What the containers of a run on this machine see of it."""

from pathlib import Path

from pipelines.local import outside


def test_containers_see_what_arguments_and_variables_name_and_write_what_they_must(
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    names = ("work/scenes", "model", "images", "key.json", "hub", "store/mlflow.db")
    places = {name: tmp_path / name for name in names}
    for place in places.values():
        place.mkdir(parents=True)
    arguments = {
        "data_dataset": str(places["work/scenes"]),
        "data_output": "gs://bucket/data",
        "caption_images": str(places["images"]),
        "train_candidates": [
            {"name": "a", "init_from": str(places["model"])},
            {"name": "/nowhere"},
        ],
    }
    environment = {
        "GOOGLE_APPLICATION_CREDENTIALS": str(places["key.json"]),
        "HF_HOME": str(places["hub"]),
        "MLFLOW_TRACKING_URI": f"sqlite:///{places['store/mlflow.db']}",
        "AWS_REGION": "eu",
    }
    read, written = (
        (str(places[name]) for name in ("images", "model")),
        (places["hub"], tmp_path / "store"),
    )
    wanted = {
        **dict.fromkeys(read, True),
        str(places["key.json"]): True,
        **{str(place): False for place in written},
    }
    assert outside(arguments, environment, work) == wanted
