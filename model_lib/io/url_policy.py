"""Which paths and addresses that someone else wrote are opened: only those the operator names.

A row of a request to a served model, or of a list in a bucket, could name a file of this machine or
a server that only this machine reaches (OWASP, "Server Side Request Forgery Prevention"). So none
is opened unless it lies under a prefix in CAPTIONER_ALLOW, a list with commas between, such as
"/data/images/,gs://ours/,http://10.0.0.7:80/", and redirects are not followed.
"""

import os
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from model_lib.errors import UserError
from model_lib.io.storage import is_local

VARIABLE = "CAPTIONER_ALLOW"
SERVERS = ("uvicorn", "gunicorn", "mlserver")
"""What MLflow serves a model with."""


class UrlNotAllowed(UserError):
    """A path or address under no allowed prefix."""


def is_serving() -> bool:
    """Return whether this process answers requests of others."""
    # The first is MLflow's own mark of a process that serves.
    return "__pyfunc_model_path__" in os.environ or any(name in sys.modules for name in SERVERS)


def require_allowed(uri: str, *prefixes: str) -> None:
    """Raise `UrlNotAllowed` unless `uri` lies under one of `prefixes` or of the operator's."""
    allowed = [*prefixes, *map(str.strip, os.environ.get(VARIABLE, "").split(","))]
    if "::" in uri or not any(_is_below(uri, prefix) for prefix in allowed if prefix):
        kind = f"{uri.partition('://')[0]}://" if "://" in uri else "a path"
        raise UrlNotAllowed(f"{uri}: not allowed here, {kind}; its prefix must be in {VARIABLE}")


def store_of(uri: str) -> str:
    """Return the bucket or server of a URI, with its scheme: all that a list in it may name."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}/"


def _is_below(uri: str, prefix: str) -> bool:
    """Return whether a path or address lies below another, with `..` and links resolved."""
    if is_local(uri) != is_local(prefix):
        return False
    if is_local(uri):
        file, folder = (Path(u.removeprefix("file://")).resolve() for u in (uri, prefix))
        return file.is_relative_to(folder)
    try:
        url, below = urlsplit(uri), urlsplit(prefix)
        if (url.scheme, url.hostname, url.port) != (below.scheme, below.hostname, below.port):
            return False
    except ValueError:  # no address
        return False
    path, decoded = "", url.path
    while decoded != path:  # a driver decodes it, and so may a server
        path, decoded = decoded, unquote(decoded)
    parts = path.replace("\\", "/").split("/")
    folders = unquote(below.path).rstrip("/").split("/")
    return ".." not in parts and parts[: len(folders)] == folders
