"""Web servers on loopback: of a handler that a test writes, or of an API's documents."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # of five, others are lost, and tried again after a second


class Handler(BaseHTTPRequestHandler):
    """Answers requests, and logs none."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(
        self,
        status: int = 200,
        content: bytes = b"",
        headers: Iterable[tuple[str, str]] = (),
        length: int | None = None,
    ) -> None:
        """Send an answer that says it has `length` bytes, by default as many as it has."""
        self.send_response(status)
        length = len(content) if length is None else length
        for name, value in (*headers, ("Content-Length", str(length))):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """Yield the address of a server that answers with `handler` until the body ends."""
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Refused(Exception):
    """An HTTP status with an API's message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ApiServer:
    """Answers requests by `route`, in a thread, on a free port."""

    def __init__(self) -> None:
        api = self

        class Requests(Handler):
            def answer(self) -> None:
                api.answer(self)

            do_GET = do_POST = do_DELETE = answer

        self.stack = contextlib.ExitStack()
        self.host = self.stack.enter_context(serving(Requests))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def answer(self, request: Handler) -> None:
        url = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        try:
            status, document = 200, self.route(request, url.path, query)
        except Refused as refused:
            status, document = refused.status, self.refusal(refused)
        kind, text = "text/plain", document
        if not isinstance(document, str):
            kind, text = "application/json", json.dumps(document)
        request.reply(status, text.encode(), [("Content-Type", kind)])

    def route(self, request: Handler, path: str, query: dict[str, str]) -> dict | str:
        """Return the document or text that answers a request; `Refused` for another status."""
        raise NotImplementedError

    def refusal(self, refused: Refused) -> dict:
        return {"code": refused.status, "message": str(refused)}


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def website(folder: Path) -> contextlib.AbstractContextManager[str]:
    """Return a server of the files in `folder`."""
    return serving(partial(_Files, directory=str(folder)))
