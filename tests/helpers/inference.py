"""A served model, asked in KServe's protocol v2."""

import base64
import contextlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.services import free_port, running
from tests.helpers.warm_python import warm_python


class Answer(NamedTuple):
    """An HTTP answer, its body as JSON."""

    status: int
    body: Any
    headers: Any

    def output(self, name: str = "caption") -> list[Any]:
        """Return the values of an output."""
        assert self.status == 200, self.body
        (data,) = (o["data"] for o in self.body["outputs"] if o["name"] == name)
        return data


@contextlib.contextmanager
def captioner_server(
    model: str | Path, log: Path, *options: str, environment: Iterable[str] = ()
) -> Iterator[str]:
    """Yield the address of `captioner serve`, with options and variables NAME=VALUE; its output is
    in `log`."""
    port = free_port()
    command = ["env", *environment, warm_python(), "-m", "model_lib", "serve", "--model"]
    address = f"http://127.0.0.1:{port}"
    with running([*command, str(model), f"--port={port}", *options], f"{address}/v2", log):
        yield address


def encode(image: Path | bytes) -> str:
    """Return an image in base64."""
    return base64.b64encode(image if isinstance(image, bytes) else image.read_bytes()).decode()


def images(rows: list[Any], **parameters: Any) -> dict[str, Any]:
    """Return a request for captions."""
    tensor = {"name": "image", "shape": [len(rows)], "datatype": "BYTES", "data": rows}
    return {"inputs": [tensor], "parameters": parameters}


def infer(address: str, document: Any) -> Answer:
    """Return the answer to a request, a document or its bytes."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return get(f"{address}/v2/models/captioner/infer", body)


def get(url: str, body: bytes | None = None) -> Answer:
    """Return the answer to a GET, or to a POST with a body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=120) as answer:
            return Answer(answer.status, json.loads(answer.read()), answer.headers)
    except urllib.error.HTTPError as error:
        return Answer(error.code, json.loads(error.read()), error.headers)


def metrics(address: str) -> dict[str, float]:
    """Return what the server counts, by Prometheus' names with labels."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        lines = re.findall(r"^([a-z].*) (\S+)$", answer.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines}
