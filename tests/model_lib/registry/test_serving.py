"""The registered model as MLflow serves it: whole, and asked over HTTP."""

import base64
import json
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from model_lib import Captioner, UserError
from model_lib.model.sources import weights_digest
from model_lib.registry.config import ExportConfig, RegisterConfig
from model_lib.registry.export import export
from model_lib.registry.registry import register
from model_lib.tracking.server import MlflowTracking
from tests.helpers.evaluations import new_registry, write_evaluation
from tests.helpers.http_server import website
from tests.helpers.services import free_port, running
from tests.helpers.warm_python import warm_python

PACKAGES = {"torch": "2.11.0", "transformers": "5.17.0"}


@pytest.fixture(scope="module")
def registry(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An embedded store in which the small captioner is champion; its tracking URI."""
    yield new_registry(tmp_path_factory.mktemp("registry"), saved_model, packages=PACKAGES)


def test_the_registered_model_is_whole(registry: str, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(registry)
    client = mlflow.MlflowClient(registry)
    version = client.get_model_version_by_alias("captioner", "champion")
    files = Path(
        mlflow.artifacts.download_artifacts("models:/captioner@champion", dst_path=str(tmp_path))
    )
    card = (files / "README.md").read_text()
    assert version.description == card and len(card) < 5000
    for words in ("# small", "| CIDEr | 0.5000 | 0.4", "frequencies come from these"):
        assert words in card, card
    for words in ("data `f`", "CC BY 4.0", "OpenAI's model card", "modified MIT", "torch 2.11.0"):
        assert words in card, card
    pinned = (files / "requirements.txt").read_text().split()
    assert {"torch==2.11.0", "transformers==5.17.0", f"mlflow=={mlflow.__version__}"} <= set(pinned)
    assert all("==" in line for line in pinned)
    assert any(line.startswith("aiohttp==") for line in pinned)
    assert (files / "code" / "model_lib" / "pages" / "templates" / "card.md").is_file()

    model = yaml.safe_load((files / "MLmodel").read_text())
    assert json.loads(model["signature"]["outputs"]) == [{"type": "string", "required": True}]
    params = {row["name"]: row for row in json.loads(model["signature"]["params"])}
    assert (params["num_beams"]["type"], params["num_beams"]["default"]) == ("long", 1)
    assert (params["top_p"]["type"], params["top_p"]["default"]) == ("double", None)
    assert "num_captions" not in params
    loaded = mlflow.pyfunc.load_model(str(files))
    (caption,) = loaded.predict(loaded.input_example)
    assert isinstance(caption, str)
    # The run that trained it, or stands for it, shows it.
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert logged.status == "READY" and '"version": 1' in logged.tags["mlflow.modelVersions"]
    assert client.get_run(version.run_id).outputs.model_outputs[0].model_id == logged.model_id


def test_a_version_is_exported_with_its_scores(registry: str, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(registry)
    assert export(ExportConfig(output=str(tmp_path)))["scores"]["CIDEr"] == pytest.approx(0.5)
    assert "| CIDEr | 0.5000 | 0.4" in (tmp_path / "README.md").read_text()


def test_weights_that_were_not_evaluated_are_not_registered(
    registry: str, saved_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(saved_model, tmp_path / "model")
    tracking = MlflowTracking(registry)
    client = mlflow.MlflowClient(registry)
    digest = weights_digest(str(model))
    evaluation = write_evaluation(tmp_path, 0.9, "better", model=model, weights=digest)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # training went on
    (model / "model.safetensors").write_bytes(weights)
    before = client.search_logged_models([tracking.experiment_id])
    message = r"/model: holds other weights than those that were evaluated; evaluate it again$"
    with pytest.raises(UserError, match=message):
        register(RegisterConfig(evaluations=(evaluation,), champion_evaluation="none"), tracking)
    assert len(client.search_logged_models([tracking.experiment_id])) == len(before)
    assert len(client.search_model_versions("name = 'captioner'")) == 1


def test_an_image_in_any_form_is_captioned(registry: str, scenes: Path) -> None:
    mlflow.set_tracking_uri(registry)
    model = mlflow.pyfunc.load_model("models:/captioner@champion")
    file = scenes / "val2017" / "000000000001.jpg"
    content = file.read_bytes()
    image = Image.open(file)
    array = np.asarray(image)
    (expected,) = model.predict([str(file)])
    encoded = base64.b64encode(content).decode()
    url_safe = base64.urlsafe_b64encode(content).decode()
    percent = urllib.parse.quote_from_bytes(content)
    for row in (
        content,
        bytearray(content),
        memoryview(content),
        image,
        file,
        array,
        encoded,
        url_safe.rstrip("="),
        "\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76)),
        f"data:image/jpeg;base64,{url_safe}",
        f"DATA:image/jpeg;name=a.jpg;BASE64,{urllib.parse.quote(encoded)}",
        f"data:;base64,{encoded.rstrip('=')}",
        f"data:,{percent}",
    ):
        assert model.predict([row, row]) == [expected] * 2, str(row)[:80]
        if not isinstance(row, str | bytes | memoryview):
            assert model.predict(row) == [expected], str(row)[:80]
    spark = {"path": ["dbfs:/a.jpg"], "length": [len(content)], "content": [content]}
    for frame in (
        pd.DataFrame(spark),
        pd.DataFrame({"image": [encoded], "other": ["x"]}),
        pd.Series([content]),
        np.stack([array]),
        np.array([str(file)]),
        (str(file),),
    ):
        assert model.predict(frame) == [expected], type(frame)


@pytest.fixture(scope="module")
def web(scenes: Path) -> Iterator[str]:
    """The address of a web server with the validation images."""
    with website(scenes / "val2017") as address:
        yield address


@pytest.fixture(scope="module")
def served(registry: str, web: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the champion's `mlflow models serve`."""
    port = free_port()
    environment = [
        f"CAPTIONER_ALLOW={tmp_path_factory.getbasetemp()}/, {web}/",
        f"MLFLOW_TRACKING_URI={registry}",
        f"PATH={Path(sys.executable).parent}:/usr/bin:/bin",
    ]
    serve = "-m mlflow models serve --model-uri models:/captioner@champion --env-manager local"
    command = ["env", *environment, warm_python(), *serve.split()]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("served") / "serve.log"
    with running(command, f"http://127.0.0.1:{port}/ping", log):
        yield f"http://127.0.0.1:{port}/invocations"


def ask(address: str, document: Any) -> tuple[int, Any]:
    """Return status and body of the answer."""
    request = urllib.request.Request(
        address, json.dumps(document).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_path_an_address_and_base64_are_captioned(
    served: str, web: str, saved_model: Path, scenes: Path
) -> None:
    image = scenes / "val2017" / "000000000001.jpg"
    encoded = base64.b64encode(image.read_bytes()).decode()
    model = Captioner.from_pretrained(str(saved_model))
    expected = model.caption([str(image)])[0].text
    rows = [str(image), f"{web}/{image.name}", encoded, f"data:image/jpeg;base64,{encoded}"]
    for document in (
        {"inputs": rows},
        {"instances": rows},
        {"dataframe_split": {"columns": ["image"], "data": [[row] for row in rows]}},
        {"dataframe_records": [{"image": row} for row in rows]},
    ):
        assert ask(served, document) == (200, {"predictions": [expected] * 4}), list(document)
    beams = model.caption([str(image)], num_beams=3, max_new_tokens=5)[0].text
    request_body = {"inputs": rows[:1], "params": {"num_beams": 3, "max_new_tokens": 5}}
    assert ask(served, request_body) == (200, {"predictions": [beams]})


def test_rows_that_are_no_images_are_refused_with_their_numbers(
    served: str, web: str, scenes: Path, tmp_path: Path
) -> None:
    image = str(scenes / "val2017" / "000000000001.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    junk = base64.b64encode(b"no image at all " * 1000).decode()
    texture = base64.b64encode(b"DDS " + bytes([124, *[0] * 400])).decode()
    truncated = base64.b64encode(Path(image).read_bytes()[:-300]).decode()
    no_image = "row 2 of 3: base64, but not of an image"
    forbidden = "not allowed here, a path; its prefix must be in CAPTIONER_ALLOW"
    for bad, message in (
        (str(tmp_path / "text.jpg"), ": unreadable: not an image in a format known here"),
        (str(tmp_path / "gone.jpg"), "gone.jpg: no such file"),
        (f"{web}/gone.jpg", "/gone.jpg: no such file"),
        (junk, no_image),
        (f"data:image/png;base64,{junk}", no_image),
        (texture, no_image),
        ("data:image/png;base64,???", "row 2 of 3: a data URI, but not of base64"),
        ("", "row 2 of 3: is empty"),
        (7, "row 2 of 3: is int, not an image"),
        (None, "row 2 of 3: is empty"),
        ("#" * 10**6, f"row 2 of 3: neither base64 nor a path or URI: '{'#' * 80}'"),
        ("nowhere://x/y.jpg", "nowhere"),
        ("/etc/passwd", f"/etc/passwd: {forbidden}"),
        ("http://169.254.169.254/a.jpg", "not allowed here, http://"),
        (truncated, "row 2 of 3: truncated"),
    ):
        rows = {"columns": ["image"], "data": [[image], [bad], [image]]}
        status, body = ask(served, {"dataframe_split": rows})
        assert (status, body["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), body
        assert body["message"].startswith("row 2 of 3: ") and message in body["message"], body
        assert "\n" not in body["message"] and len(body["message"]) < 400
        assert "Traceback" not in str(body)
    status, body = ask(served, {"inputs": [*["gone.jpg"] * 7, image]})
    assert status == 400 and body["message"].startswith("row 1 of 8: ")
    assert body["message"].endswith("; 2 more rows")


def test_requests_of_another_shape_are_refused(served: str, scenes: Path) -> None:
    image = str(scenes / "val2017" / "000000000001.jpg")
    for document in (
        {"inputs": [1, 2]},
        {"images": [image]},
        {"inputs": [image], "params": {"top_p": 7.0}},
        {"inputs": [image], "params": {"num_beams": "many"}},
        [image],
    ):
        status, body = ask(served, document)
        assert status == 400 and "Traceback" not in str(body), (document, body)
    empty = (200, {"predictions": []})
    assert ask(served, {"dataframe_split": {"columns": ["image"], "data": []}}) == empty
    assert ask(served, {"inputs": []}) == empty
    # Of several columns without bytes the first one counts.
    first, two = (
        {"columns": columns, "data": [[image, "x"][: len(columns)]]}
        for columns in (["a"], ["a", "b"])
    )
    assert ask(served, {"dataframe_split": first}) == ask(served, {"dataframe_split": two})


def test_a_request_has_an_upper_bound(served: str, scenes: Path) -> None:
    image = str(scenes / "val2017" / "000000000001.jpg")
    limit = "that a request may have here"
    for rows, params, message in (
        (1, {"num_beams": 17}, f"num_beams: 17 is more than the 16 {limit}"),
        (1, {"max_new_tokens": 201}, f"max_new_tokens: 201 is more than the 200 {limit}"),
        (257, {}, f"257 rows: are more than the 256 {limit}; send several"),
    ):
        status, body = ask(served, {"inputs": [image] * rows, "params": params})
        assert status == 400
        assert body == {"error_code": "INVALID_PARAMETER_VALUE", "message": message}
    params = {"num_beams": 16, "max_new_tokens": 3}
    status, body = ask(served, {"inputs": [image], "params": params})
    assert status == 200 and len(body["predictions"]) == 1
