"""The page's server."""

import errno
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from model_lib.errors import UserError
from model_lib.exits import catch_signals
from model_lib.io.images import LARGEST_FILE
from model_lib.model.captioning import ImageCaptioner
from model_lib.model.config import DecodeConfig
from model_lib.pages.page import render_page

if TYPE_CHECKING:
    import uvicorn

POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "base-uri 'self'; form-action 'self'; object-src 'none'"
)
"""What a browser may load for the page: nothing from elsewhere, whatever Gradio links to."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; port 0 stands for a free one.

    Raises:
        UserError: the address is not this machine's, or the port is in use.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port}: is in use; --port 0 takes a free one") from error
        reason = str(error.strerror).partition(" (")[0]
        raise UserError(f"{host}:{port}: {reason}; give one of this machine's addresses") from error


def address(listener: socket.socket) -> str:
    """Return the web address of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def page_server(
    model: ImageCaptioner, name: str, decode: DecodeConfig
) -> Iterator["uvicorn.Server"]:
    """Yield the page's server, whose `run(sockets=[listener])` ends with a stop signal.

    Args:
        model: the captioner.
        name: what the page calls it.
        decode: how captions are decoded unless the page's controls say otherwise.
    """
    # The server shuts down first; then the signal is raised again, and the uploads are removed.
    with (
        catch_signals(signal.SIGTERM),
        tempfile.TemporaryDirectory(prefix="captioner-app-") as uploads,
    ):
        # Both are read by Gradio.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = uploads
        import gradio
        import uvicorn
        from fastapi import FastAPI
        from starlette.datastructures import MutableHeaders
        from starlette.types import Message, Receive, Scope, Send

        from model_lib.app.page import build_page

        app = FastAPI(openapi_url=None)

        async def with_policy(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_with_policy(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
                await send(message)

            await app(scope, receive, send_with_policy)

        font = ["system-ui", "sans-serif"]  # Gradio's own are Google's
        gradio.mount_gradio_app(
            app,
            build_page(model, name, decode),
            path="/",
            footer_links=[],
            run_history=False,
            max_file_size=LARGEST_FILE,
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            theme=gradio.themes.Default(primary_hue="blue", font=font, font_mono=["monospace"]),
            head=render_page("app_head.html"),
        )
        # Pages that are open keep a connection, which must not keep the server from ending.
        config = uvicorn.Config(with_policy, log_level="critical", timeout_graceful_shutdown=1)
        yield uvicorn.Server(config)
