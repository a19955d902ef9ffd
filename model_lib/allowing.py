"""What strangers may make us open: the rows of a request to the served model, and lists of pictures from elsewhere.

A path or address that someone else chose is not opened because it can be: it could be a file of this machine, or a
server that only this machine reaches (OWASP, "Server Side Request Forgery Prevention"). What an operator names in
CAPTIONER_ALLOW, prefixes with commas between, is open all the same: "/data/pictures/, gs://ours/, http://10.0.0.7:80/".
"""

import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from model_lib.errors import UserError

VARIABLE = "CAPTIONER_ALLOW"
REMOTE = ("https://", "gs://", "s3://")
"""What a served model opens unless told otherwise; of web servers only those that the whole world reaches."""
SERVERS = ("uvicorn", "gunicorn", "mlserver")
"""What MLflow serves a model with: where one of them runs, rows come from strangers."""


class NotAllowed(UserError):
    """A path or address that is not opened for whoever named it."""


def serving() -> bool:
    """Return whether this process answers strangers."""
    return "__pyfunc_model_path__" in os.environ or any(name in sys.modules for name in SERVERS)  # MLflow's own sign


def require_allowed(uri: str) -> None:
    """Raise `NotAllowed` unless a stranger may have `uri`, a path or an address, opened here."""
    if "::" in uri or not (uri.startswith(REMOTE) or _named(uri)):
        kind = f"{uri.partition('://')[0]}://" if "://" in uri else "a path"
        raise NotAllowed(f"{uri}: not allowed here, {kind}; send base64, or set {VARIABLE} on the server")


def require_listed(uri: str, source: str) -> None:
    """Raise `NotAllowed` if a list from elsewhere names a picture that is not in its own store."""
    if "://" not in source or source.startswith("file://"):
        return
    scheme, _, rest = source.partition("://")
    if "::" in uri or not (_below(uri, f"{scheme}://{rest.partition('/')[0]}/") or _named(uri)):
        raise NotAllowed(f"not allowed: {source} may name pictures of its own store only, and of {VARIABLE}")


def _named(uri: str) -> bool:
    """Whether the operator allowed it."""
    return any(_below(uri, prefix.strip()) for prefix in os.environ.get(VARIABLE, "").split(",") if prefix.strip())


def _below(uri: str, prefix: str) -> bool:
    """Whether a path or address lies below another, once `..`, links and names of users are taken out of it."""
    if "://" not in uri or uri.startswith("file://"):
        if "://" in prefix and not prefix.startswith("file://"):
            return False
        path, root = (Path(one.removeprefix("file://")).resolve() for one in (uri, prefix))
        return path.is_relative_to(root)
    ours, theirs = urlsplit(uri), urlsplit(prefix)
    if (ours.scheme, ours.netloc) != (theirs.scheme, theirs.netloc):
        return False
    parts, wanted = ours.path.split("/"), theirs.path.rstrip("/").split("/")
    return ".." not in parts and (theirs.path in ("", "/") or parts[: len(wanted)] == wanted)


def _require_reachable(host: str, address: str) -> None:
    found = ipaddress.ip_address(address.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    servers = [urlsplit(one.strip()) for one in os.environ.get(VARIABLE, "").split(",")]
    named = {server.hostname for server in servers if server.scheme in ("http", "https")}
    if host in named or (found.is_global if serving() else not found.is_link_local):
        return
    raise NotAllowed(f"{host}: not allowed, it is {found}, an address inside; {VARIABLE} can name it")


async def web_session(**options: Any) -> Any:
    """Return aiohttp's session for fsspec, which looks at each address that it is about to connect to.

    Redirects and names that mean another address a moment later come by here as well. Nothing is fetched from
    link-local addresses, where clouds keep a machine's credentials; a served model connects to public ones alone.
    """
    import aiohttp
    from aiohttp.resolver import ThreadedResolver

    class Resolver(ThreadedResolver):
        async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[Any]:
            found = await super().resolve(host, port, family)
            for one in found:
                _require_reachable(host, one["host"])
            return found

    class Connector(aiohttp.TCPConnector):
        async def connect(self, req: Any, *rest: Any, **named: Any) -> Any:
            try:
                ipaddress.ip_address(req.url.host)
            except ValueError:
                pass  # a name, for the resolver
            else:
                _require_reachable(req.url.host, req.url.host)
            return await super().connect(req, *rest, **named)

    return aiohttp.ClientSession(connector=Connector(resolver=Resolver()), **options)
