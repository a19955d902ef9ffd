"""`captioner serve` over HTTP: KServe's protocol v2, its limits and its end."""

import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_lib import Captioner, __version__
from tests.helpers.evaluations import new_registry
from tests.helpers.http_server import website
from tests.helpers.inference import captioner_server, encode, get, images, infer, metrics
from tests.helpers.services import free_port, refusing
from tests.helpers.warm_python import warm_python

ROOT = Path(__file__).parents[3]
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def files(scenes: Path) -> list[Path]:
    return sorted((scenes / "val2017").iterdir())


@pytest.fixture(scope="module")
def web(scenes: Path) -> Iterator[str]:
    """The address of a web server with the validation images."""
    with website(scenes / "val2017") as address:
        yield address


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The address of a web server that fails."""
    with refusing(500) as (address, _):
        yield address


@pytest.fixture(scope="module")
def served(
    saved_model: Path, scenes: Path, web: str, store: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a server that opens the scenes, here and on the web."""
    log = tmp_path_factory.mktemp("served") / "serve.log"
    allowed = [f"CAPTIONER_ALLOW={scenes}/, {web}/, {store}/"]
    with captioner_server(saved_model, log, environment=allowed) as address:
        yield address
    name = f"{saved_model} answers at {address}"
    assert log.read_text() == f"captioner: {name}\n", "nothing else is logged"


def test_images_in_every_form_are_captioned_as_by_the_model(
    served: str, web: str, saved_model: Path, files: list[Path]
) -> None:
    model = Captioner.from_pretrained(str(saved_model))
    expected = model.caption(files[:1])[0]
    encoded = encode(files[0])
    url_safe = encoded.replace("+", "-").replace("/", "_").rstrip("=")
    data = f"data:image/jpeg;base64,{encoded}"
    rows = [encoded, url_safe, data, str(files[0]), f"{web}/{files[0].name}"]
    answer = infer(served, images(rows))
    assert answer.output() == [expected.text] * 5
    assert answer.output("score") == pytest.approx([expected.score] * 5, abs=1e-5)
    assert answer.body["model_name"] == "captioner"
    assert answer.body["model_version"] == saved_model.name
    assert [(o["name"], o["datatype"], o["shape"]) for o in answer.body["outputs"]] == [
        ("caption", "BYTES", [5]),
        ("score", "FP32", [5]),
    ]
    options = {"num_beams": 3, "max_new_tokens": 5}
    answer = infer(served, images(rows, **options))
    assert answer.output() == [model.caption(files[:1], **options)[0].text] * 5


def test_a_request_may_have_an_id_a_nested_tensor_and_one_output(
    served: str, files: list[Path]
) -> None:
    encoded = encode(files[0])
    document = images([[encoded], [encoded]])
    document["inputs"][0]["shape"] = [2, 1]
    document |= {"id": "a-1", "outputs": [{"name": "score"}]}
    answer = infer(served, document)
    assert len(answer.output("score")) == 2 and answer.body["id"] == "a-1"
    assert [output["name"] for output in answer.body["outputs"]] == ["score"]
    assert infer(served, images([])).output() == []


def test_health_and_metadata(served: str, saved_model: Path) -> None:
    _, inference = yaml.safe_load_all((ROOT / "deploy" / "kserve.yaml").read_text())
    (container,) = inference["spec"]["predictor"]["containers"]
    probes = [probe["httpGet"]["path"] for name, probe in container.items() if "Probe" in name]
    assert len(probes) == 3
    for path in [*probes, "/v2/models/captioner/ready"]:
        assert get(served + path).status == 200, path
    about = get(f"{served}/v2").body
    assert about == {"name": "captioner", "version": __version__, "extensions": []}
    model = get(f"{served}/v2/models/captioner").body
    assert model["name"] == "captioner" and model["versions"] == [saved_model.name]
    assert model["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert [output["name"] for output in model["outputs"]] == ["caption", "score"]
    for path, status in (("/v2/models/other/ready", 404), ("/v2/models/captioner/infer", 405)):
        answer = get(served + path)
        assert answer.status == status and answer.body["error"].startswith(f"GET {path}: ")


def test_a_row_that_is_no_image_is_named_and_other_requests_are_answered(
    served: str, web: str, files: list[Path], tmp_path: Path
) -> None:
    good = encode(files[0])
    expected = infer(served, images([good])).output()
    forbidden = "not allowed here"
    with ThreadPoolExecutor(8) as clients:
        for bad, message in (
            (encode(b"no image at all " * 1000), "base64, but not of an image"),
            (encode(files[0].read_bytes()[:-300]), "truncated"),
            ("data:image/png;base64,???", "a data URI, but not of base64"),
            ("", "is empty"),
            ("/etc/passwd", f"/etc/passwd: {forbidden}, a path; its prefix must be in"),
            ("http://169.254.169.254/a.jpg", f"{forbidden}, http://"),
            (f"{web}/gone.jpg", "/gone.jpg: no such file"),
            (7, "is int, not text"),
        ):
            others = [clients.submit(infer, served, images([good])) for _ in range(4)]
            answer = infer(served, images([good, bad, good]))
            assert answer.status == 400 and list(answer.body) == ["error"], answer
            error = answer.body["error"]
            assert error.startswith("row 2 of 3: ") and message in error, error
            assert "\n" not in error and len(error) < 400
            assert [other.result().output() for other in others] == [expected] * 4
    answer = infer(served, images([*["gone.jpg"] * 7, good]))
    assert answer.body["error"].startswith("row 1 of 8: ")
    assert answer.body["error"].endswith("; 2 more rows")


def test_a_store_that_fails_may_be_asked_again(served: str, store: str, files: list[Path]) -> None:
    answer = infer(served, images([encode(files[0]), f"{store}/a.jpg"]))
    assert answer.status == 503 and answer.headers["Retry-After"] == "1"
    assert answer.body["error"].startswith(f"row 2 of 2: {store}/a.jpg: ")


def changed(**values: Any) -> dict[str, Any]:
    """Return a request with another tensor."""
    document = images(["a"])
    document["inputs"][0] |= values
    return document


@pytest.mark.parametrize(
    ("document", "error"),
    [
        (b"{", "not a request of the Open Inference Protocol: Invalid JSON: EOF"),
        (b"[" * 100_000, "not a request of the Open Inference Protocol: Invalid JSON: recursion"),
        ({"instances": ["a"]}, "not a request of the Open Inference Protocol: inputs: Field"),
        ({"inputs": []}, "inputs: 0 tensors, not one"),
        (changed(datatype="UINT8"), "input image: datatype UINT8 is not BYTES"),
        (changed(shape=[2]), "input image: shape [2] is not that of 1 values"),
        (changed(shape=[-1, -1]), "input image: shape [-1, -1] is not that of 1 values"),
        (changed(shape=[2**63] * 9_000), "input image: shape [9223372036854775808, "),
        (changed(data="a"), "not a request of the Open Inference Protocol: inputs.0.data: "),
        ({**images(["a"]), "outputs": [{"name": "x"}]}, "output 'x': is not caption or score"),
        (images(["a"], top_p=7), "top_p: 7.0 is not above 0 and at most 1"),
        (images(["a"], num_beams="many"), "DecodeConfig: num_beams: "),
        (images(["a"], beams=2), "DecodeConfig: unknown option 'beams'; one of "),
        (images(["a"], cls=1), "DecodeConfig: unknown option 'cls'; one of "),
        (images(["a"], num_beams=17), "num_beams: 17 is more than the 16 that a request may"),
        (images(["a"], max_new_tokens=201), "max_new_tokens: 201 is more than the 200 "),
        (images(["a"], num_beams=2, num_captions=2), "num_captions: 2 is more than the 1 "),
        (images(["a"] * 65), "65 rows: are more than the 64 that a request may have here"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_other_requests_are_refused_in_one_line(served: str, document: Any, error: str) -> None:
    answer = infer(served, document)
    assert answer.status == 400 and answer.body["error"].startswith(error), answer.body
    assert "\n" not in answer.body["error"]


def test_what_the_model_cannot_decode_is_refused(served: str, files: list[Path]) -> None:
    answer = infer(served, images([encode(files[0])], max_new_tokens=199))
    assert answer.status == 400 and "model's 47 positions" in answer.body["error"]


def test_what_is_done_is_counted_for_prometheus(served: str, files: list[Path]) -> None:
    before = metrics(served)
    infer(served, images([encode(files[0])] * 3))
    infer(served, {"inputs": []})
    after = metrics(served)
    more = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert more['captioner_requests_total{status="200"}'] == 1
    assert more['captioner_requests_total{status="400"}'] == 1
    assert more["captioner_request_seconds_count"] == 2
    assert more["captioner_images_total"] == more["captioner_batch_images_sum"] == 3
    assert more["captioner_batch_images_count"] == more["captioner_batch_seconds_count"] == 1
    assert after["captioner_queue_images"] == 0


def test_32_requests_over_http_are_one_batch_and_more_than_the_queue_are_told_to_wait(
    saved_model: Path, files: list[Path], tmp_path: Path
) -> None:
    limits = "--batch_size=32 --wait_ms=600000 --queue_images=40 --request_images=40"
    limits += " --request_mb=1 --queue_mb=1"
    encoded = encode(files[0])

    def wait_for(count: float) -> None:
        while metrics(address)["captioner_queue_images"] != count:
            time.sleep(0.02)

    with (
        captioner_server(saved_model, tmp_path / "log", *limits.split()) as address,
        ThreadPoolExecutor(32) as clients,
    ):
        answers = [clients.submit(infer, address, images([encoded])) for _ in range(31)]
        wait_for(31)
        answer = infer(address, images([encoded] * 10))
        assert answer.status == 503 and answer.headers["Retry-After"] == "1"
        assert answer.body["error"] == "busy: there are 31 images under way; try again"
        answer = infer(address, b"x" * 1_000_001)
        assert answer.status == 413
        assert answer.body["error"] == "the request has more than 1 MB; send several"
        answer = infer(address, b" " * 999_999)
        assert answer.status == 503 and "bytes under way" in answer.body["error"]
        assert len({*infer(address, images([encoded])).output()}) == 1
        assert all(answer.result().status == 200 for answer in answers)
        counts = metrics(address)
        assert counts["captioner_batch_images_count"] == 1
        assert counts["captioner_batch_images_sum"] == 32
        wait_for(0)


def test_sigterm_ends_it_once_what_is_under_way_is_answered(
    saved_model: Path, files: list[Path], tmp_path: Path
) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [warm_python(), "-m", "model_lib", "serve", "--model", str(saved_model)]
    command += [f"--port={port}", "--wait_ms=1500"]
    with (tmp_path / "log").open("w") as log, ThreadPoolExecutor() as client:
        server = subprocess.Popen(command, stderr=log)
        answer: Future = client.submit(_when_there, address, images([encode(files[0])]))
        while not _has_images(address):
            assert server.poll() is None
            time.sleep(0.02)
        server.send_signal(signal.SIGTERM)
        assert answer.result().status == 200
        assert server.wait(60) == 143
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert "Traceback" not in (tmp_path / "log").read_text()


def _when_there(address: str, document: Any) -> Any:
    while True:
        try:
            return infer(address, document)
        except OSError:
            time.sleep(0.02)


def _has_images(address: str) -> bool:
    try:
        return metrics(address)["captioner_queue_images"] == 1
    except OSError:
        return False


def test_the_champion_is_looked_up_at_the_start(
    saved_model: Path, files: list[Path], tmp_path: Path
) -> None:
    store = [f"MLFLOW_TRACKING_URI={new_registry(tmp_path, saved_model)}"]
    champion = "models:/captioner@champion"
    with captioner_server(champion, tmp_path / "log", environment=store) as address:
        answer = infer(address, images([encode(files[0])]))
        assert answer.status == 200 and answer.body["model_version"] == "1"
        assert metrics(address)['captioner_model_info{version="1"}'] == 1
        log = (tmp_path / "log").read_text()
        assert f"captioner: models:/captioner/1 answers at {address}\n" in log


def test_mistakes_are_one_line(captioner: Run, saved_model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = captioner("serve", "--model", saved_model, "--port", port)
        line = "cannot be opened: Address already in use; give another --host or --port"
        error = f"captioner: error: port {port} of 127.0.0.1: {line}\n"
        assert (done.returncode, done.stderr) == (2, error)
    done = captioner("serve", "--model", tmp_path / "gone", "--port", 0)
    assert done.returncode == 2 and re.fullmatch(r"captioner: error: .*gone: .*\n", done.stderr)
    done = captioner("serve", "--model", saved_model, "--request_images", 9, "--queue_images", 8)
    line = "queue_images: 8 is less than request_images, 9: such a request would never be taken"
    assert done.returncode == 2 and line in done.stderr
