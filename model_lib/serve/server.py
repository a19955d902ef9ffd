"""The server: HTTP in front of the batches."""

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model_lib.errors import UserError, WorkError, printable
from model_lib.exits import catch_signals
from model_lib.io.cpus import cpu_count
from model_lib.model.captioning import ImageCaptioner, Problem, load_pixels
from model_lib.model.requests import decode_text, describe_problems, require_limits
from model_lib.model.rivals import load_captioner
from model_lib.model.sources import lasting_source
from model_lib.serve.batcher import Batcher
from model_lib.serve.config import MB, ServeConfig
from model_lib.serve.metrics import CONTENT_TYPE, Metrics
from model_lib.serve.protocol import (
    infer_response,
    model_metadata,
    parse_request,
    server_metadata,
)

READERS = 8
"""Threads that read images from addresses, beside those that decode: a store may be slow."""
RETRY_AFTER = {"Retry-After": "1"}
"""Header of an answer 503: seconds after which the same request may be taken."""
Hold = Callable[[str, int], None]


class Refused(Exception):
    """A request that is not answered: HTTP status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """The routes of the protocol, and what is under way.

    Args:
        config: name and limits.
        model: the captioner.
        version: of the model.
    """

    def __init__(self, config: ServeConfig, model: ImageCaptioner, version: str) -> None:
        self.config, self.model, self.version = config, model, version
        self.most = {"images": config.queue_images, "bytes": config.queue_mb * MB}
        self.in_use = dict.fromkeys(self.most, 0)
        self.metrics = Metrics(version, lambda: self.in_use["images"])
        self.readers = ThreadPoolExecutor(READERS, "readers")
        self.decoders = ThreadPoolExecutor(cpu_count(), "decoders")

    def app(self, batcher: Batcher) -> Starlette:
        """Return the application, whose captions are those of `batcher`."""
        self.batcher, name = batcher, self.config.name
        documents: dict[str, Any] = {
            "/v2": server_metadata(),
            "/v2/health/live": {"live": True},
            "/v2/health/ready": {"ready": True},
            f"/v2/models/{name}": model_metadata(name, self.version),
            f"/v2/models/{name}/ready": {"name": name, "ready": True},
        }
        routes = [Route(path, partial(_answer, content)) for path, content in documents.items()]
        routes.append(Route(f"/v2/models/{name}/infer", self.infer, methods=["POST"]))
        routes.append(Route("/metrics", self.show_metrics))
        return Starlette(routes=routes, exception_handlers={HTTPException: _refuse})

    async def show_metrics(self, _: Request) -> Response:
        """Answer Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def infer(self, request: Request) -> Response:
        """Answer a request for captions."""
        began = time.monotonic()
        try:
            with self._holding() as hold:
                response = JSONResponse(await self._caption(request, hold))
        except Refused as refused:
            headers = RETRY_AFTER if refused.status == 503 else None
            response = JSONResponse({"error": str(refused)}, refused.status, headers)
        self.metrics.requests.labels(str(response.status_code)).inc()
        self.metrics.request_seconds.observe(time.monotonic() - began)
        return response

    @contextmanager
    def _holding(self) -> Iterator[Hold]:
        """Yield a function that reserves room for a request's images and bytes, until its end."""
        reserved = dict.fromkeys(self.most, 0)

        def hold(unit: str, amount: int) -> None:
            if self.in_use[unit] + amount > self.most[unit]:
                raise Refused(
                    503, f"busy: there are {self.in_use[unit]:,} {unit} under way; try again"
                )
            self.in_use[unit] += amount
            reserved[unit] += amount

        try:
            yield hold
        finally:
            for unit, amount in reserved.items():
                self.in_use[unit] -= amount

    async def _caption(self, request: Request, hold: Hold) -> dict[str, Any]:
        run = asyncio.get_running_loop().run_in_executor
        body = await self._body(request, hold)
        try:
            parsed = await run(self.decoders, parse_request, body)
            require_limits(len(parsed.rows), parsed.decode, self.config.request_images)
        except UserError as error:
            raise Refused(400, str(error)) from error
        hold("images", len(parsed.rows))
        loaded = await asyncio.gather(*map(self._load, parsed.rows))
        problems = {n: result for n, result in enumerate(loaded) if isinstance(result, Problem)}
        if problems:
            is_transient = all(isinstance(problem, WorkError) for problem in problems.values())
            raise Refused(503 if is_transient else 400, describe_problems(parsed.rows, problems))
        pixels = [result for result in loaded if isinstance(result, np.ndarray)]
        futures = self.batcher.submit(pixels, parsed.decode)
        try:
            captions = await asyncio.gather(*map(asyncio.wrap_future, futures))
        except (UserError, WorkError) as error:
            raise Refused(400 if isinstance(error, UserError) else 500, str(error)) from error
        self.metrics.images.inc(len(captions))
        return infer_response(parsed, captions, self.config.name, self.version)

    async def _body(self, request: Request, hold: Hold) -> bytes:
        most, parts, size = self.config.request_mb, [], 0
        announced = request.headers.get("content-length", "")
        try:
            async for part in request.stream():
                size += len(part)
                if max(size, int(announced or 0)) > most * MB:
                    raise Refused(413, f"the request has more than {most} MB; send several")
                hold("bytes", len(part))
                parts.append(part)
        except ClientDisconnect:
            raise Refused(400, "the client went away") from None
        return b"".join(parts)

    async def _load(self, row: str) -> np.ndarray | Problem:
        """Return the pixels of an image, or why there are none."""
        run = asyncio.get_running_loop().run_in_executor
        image = await run(self.decoders, self._decode, row)
        if isinstance(image, str):
            return await run(self.readers, load_pixels, self.model, image, False)
        return image

    def _decode(self, row: str) -> np.ndarray | Problem | str:
        """Return the pixels of an image, or why there are none, or its path or address."""
        image = decode_text(row)
        return image if isinstance(image, str) else load_pixels(self.model, image)


async def _answer(content: dict[str, Any], _: Request) -> Response:
    return JSONResponse(content)


async def _refuse(request: Request, error: Exception) -> Response:
    """Answer an address that is not there."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse({"error": message}, error.status_code, error.headers)


def serve(config: ServeConfig) -> None:
    """Answer requests until SIGTERM or SIGINT, and then those that are under way.

    The server listens once the model has captioned a first image.

    Raises:
        UserError: there is no such model, or the port cannot be opened.
        WorkError: the model's store failed, or the model fails.
        SystemExit: 143 or 130, after a signal.
    """
    with catch_signals(signal.SIGTERM, signal.SIGINT), _bound(config.host, config.port) as port:
        source = lasting_source(config.model)
        model = load_captioner(source, config.device, config.precision)
        server = Server(config, model, source.rstrip("/").rpartition("/")[2])
        failures: list[WorkError] = []

        def stop(problem: WorkError) -> None:
            failures.append(problem)
            http.should_exit = True

        wait = config.wait_ms / 1000
        with Batcher(model, config.batch_size, wait, server.metrics.batch, stop) as batcher:
            settings = uvicorn.Config(
                server.app(batcher),
                log_config=None,
                access_log=False,
                ws="none",
                timeout_keep_alive=65,  # as KServe's own servers: longer than a proxy's before it
            )
            http = uvicorn.Server(settings)
            host = f"[{config.host}]" if ":" in config.host else config.host
            address = f"http://{host}:{port.getsockname()[1]}"
            print(
                printable(f"captioner: {source} answers at {address}"), file=sys.stderr, flush=True
            )
            http.run(sockets=[port])
        if failures:
            raise failures[0]


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket that has the port, but does not listen yet: a port in use is an error before a
    model is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except OSError as error:
            problem = f"cannot be opened: {error.strerror}; give another --host or --port"
            raise UserError(f"port {port} of {host}: {problem}") from error
        yield bound
