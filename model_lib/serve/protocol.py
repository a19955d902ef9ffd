"""Documents of KServe's protocol v2, the Open Inference Protocol, in JSON: one tensor of images in,
captions and scores out."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic refuses that of Python before 3.12

import model_lib
from model_lib.errors import UserError
from model_lib.io.validation import parse
from model_lib.model.captioning import Caption
from model_lib.model.config import DecodeConfig
from model_lib.options import require

OUTPUTS = {"caption": "BYTES", "score": "FP32"}
MOST_DIMENSIONS = 8
"""Of an input."""


class Tensor(TypedDict):
    """An input."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any]
    parameters: NotRequired[dict[str, Any]]


class Output(TypedDict):
    """An output that is asked for."""

    name: str
    parameters: NotRequired[dict[str, Any]]


class _Document(TypedDict):
    id: NotRequired[str]
    inputs: list[Tensor]
    outputs: NotRequired[list[Output]]
    parameters: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class InferRequest:
    """A request for captions."""

    rows: list[str]
    """Base64, data URIs, paths or addresses of images."""
    decode: DecodeConfig
    outputs: tuple[str, ...]
    """Names of the outputs that are asked for."""
    id: str | None


def parse_request(body: bytes) -> InferRequest:
    """Return a request for inference; `UserError` if it is none that is answered here."""
    try:
        document = parse(_Document, body)
    except ValueError as error:
        raise UserError(f"not a request of the Open Inference Protocol: {error}") from None
    require(len(document["inputs"]) == 1, f"inputs: {len(document['inputs'])} tensors, not one")
    (tensor,) = document["inputs"]
    name, shape, kind = tensor["name"], tensor["shape"], tensor["datatype"]
    require(kind == "BYTES", f"input {name}: datatype {kind:.20} is not BYTES, base64 or addresses")
    rows = list(_flat(tensor["data"]))
    size = f"input {name}: shape {shape!s:.80} is not that of {len(rows)} values"
    # Numbers without end would be multiplied for minutes.
    is_bounded = len(shape) <= MOST_DIMENSIONS and all(0 <= n <= len(rows) for n in shape)
    require(is_bounded and math.prod(shape) == len(rows), size)
    for number, row in enumerate(rows):
        if not isinstance(row, str):
            raise UserError(f"row {number + 1} of {len(rows)}: is {type(row).__name__}, not text")
    outputs = tuple(output["name"] for output in document.get("outputs", ())) or (*OUTPUTS,)
    for output in outputs:
        require(output in OUTPUTS, f"output {output!r:.80}: is not {' or '.join(OUTPUTS)}")
    decode = DecodeConfig.from_options(**document.get("parameters", {}))
    return InferRequest(rows, decode, outputs, document.get("id"))


def _flat(data: list[Any]) -> Iterator[Any]:
    """Yield a tensor's values, which may be nested as its shape is."""
    for value in data:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value


def infer_response(
    request: InferRequest, captions: Sequence[Caption], name: str, version: str
) -> dict[str, Any]:
    """Return the answer to a request: `caption`, BYTES [N], and `score`, FP32 [N], the mean
    log-probability of a caption's tokens in nats."""
    data = {
        "caption": [caption.text for caption in captions],
        "score": [caption.score for caption in captions],
    }
    outputs = [
        {"name": o, "shape": [len(captions)], "datatype": OUTPUTS[o], "data": data[o]}
        for o in request.outputs
    ]
    document = {"model_name": name, "model_version": version, "outputs": outputs}
    return document if request.id is None else {**document, "id": request.id}


def server_metadata() -> dict[str, Any]:
    """Return what the server says of itself."""
    return {"name": "captioner", "version": model_lib.__version__, "extensions": []}


def model_metadata(name: str, version: str) -> dict[str, Any]:
    """Return what the server says of its model."""
    outputs = [{"name": n, "datatype": kind, "shape": [-1]} for n, kind in OUTPUTS.items()]
    inputs = [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    about = {"name": name, "versions": [version], "platform": "captioner"}
    return {**about, "inputs": inputs, "outputs": outputs}
