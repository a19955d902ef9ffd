"""What strangers may make us open: the rows of a request to the served model, and lists of images
from elsewhere.

A path or address that someone else chose is not opened because it can be: it could be a file of
this machine, or a server that only this machine reaches (OWASP, "Server Side Request Forgery
Prevention"). What an operator names in CAPTIONER_ALLOW, prefixes with commas between, is open all
the same: "/data/images/, gs://ours/, http://10.0.0.7:80/".
"""

import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from model_lib.errors import UserError

VARIABLE = "CAPTIONER_ALLOW"
REMOTE = ("https://", "gs://", "s3://")
"""What a served model opens unless told otherwise; of web servers only those that the whole world
reaches."""
PORTS = {"http": 80, "https": 443}
METADATA = [
    ipaddress.ip_network(network)
    for network in (
        *("169.254.0.0/16", "fe80::/10"),  # link-local: nearly all of them
        *("fd00:ec2::/32", "fd20:ce::254/128", "fd00:c1::a9fe:a9fe/128"),  # AWS, Google, Oracle
        *("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),  # Alibaba, Azure, Oracle
    )
]
"""Where clouds keep a machine's credentials."""
TRANSLATED = [
    ipaddress.ip_network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")
]
"""IPv6 whose last 32 bits are an address of IPv4: what NAT64 translates (RFC 6052, RFC 8215), and
its forerunner."""
SERVERS = ("uvicorn", "gunicorn", "mlserver")
"""What MLflow serves a model with: where one of them runs, rows come from strangers."""


class UrlNotAllowed(UserError):
    """A path or address that is not opened for whoever named it."""


def serving() -> bool:
    """Return whether this process answers strangers."""
    return "__pyfunc_model_path__" in os.environ or any(
        name in sys.modules for name in SERVERS
    )  # MLflow's own sign


def require_allowed(uri: str) -> None:
    """Raise `UrlNotAllowed` unless a stranger may have `uri`, a path or an address, opened here."""
    if "::" in uri or not (uri.startswith(REMOTE) or _named(uri)):
        kind = f"{uri.partition('://')[0]}://" if "://" in uri else "a path"
        raise UrlNotAllowed(
            f"{uri}: not allowed here, {kind}; send base64, or set {VARIABLE} on the server"
        )


def require_listed(uri: str, source: str) -> None:
    """Raise `UrlNotAllowed` if a list from elsewhere names an image that is not in its own
    store."""
    if "://" not in source or source.startswith("file://"):
        return
    scheme, _, rest = source.partition("://")
    if "::" in uri or not (_below(uri, f"{scheme}://{rest.partition('/')[0]}/") or _named(uri)):
        raise UrlNotAllowed(
            f"not allowed: {source} may name images of its own store only, and of {VARIABLE}"
        )


def _prefixes() -> list[str]:
    """Return what the operator allows."""
    return [prefix.strip() for prefix in os.environ.get(VARIABLE, "").split(",") if prefix.strip()]


def _named(uri: str) -> bool:
    """Whether the operator allowed it."""
    return any(_below(uri, prefix) for prefix in _prefixes())


def _below(uri: str, prefix: str) -> bool:
    """Whether a path or address lies below another, once `..`, links and names of users are taken
    out of it."""
    if "://" not in uri or uri.startswith("file://"):
        if "://" in prefix and not prefix.startswith("file://"):
            return False
        path, root = (Path(one.removeprefix("file://")).resolve() for one in (uri, prefix))
        return path.is_relative_to(root)
    store = _store(uri)
    if store is None or store != _store(prefix) or _climbs(urlsplit(uri).path):
        return False
    parts, wanted = (urlsplit(one).path.rstrip("/").split("/") for one in (uri, prefix))
    return [unquote(part) for part in parts[: len(wanted)]] == [unquote(part) for part in wanted]


def _named_server(host: str, port: int) -> bool:
    """Whether the operator allowed something on it."""
    return any(
        store is not None and store[1:] == (host, port) for store in map(_store, _prefixes())
    )


def _store(uri: str) -> tuple[object, ...] | None:
    """Return what tells a server or bucket from others, or None if the address is none."""
    try:
        found = urlsplit(uri)
        if found.scheme in PORTS:
            return found.scheme, found.hostname, found.port or PORTS[found.scheme]
    except ValueError:
        return None
    return found.scheme, found.netloc


def _climbs(path: str) -> bool:
    """Whether an address's path has a `..`, however often encoded: who opens it decodes it, and so
    may a server."""
    while (decoded := unquote(path)) != path:
        path = decoded
    return ".." in path.replace("\\", "/").split("/")


def _meant(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the address of IPv4 that one of IPv6 stands for, and others unchanged."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv4Address):
        return found
    if any(found in network for network in TRANSLATED):
        return ipaddress.IPv4Address(int(found) % 2**32)
    return found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else found)


def _require_reachable(host: str, address: str) -> None:
    found = _meant(address)
    if any(found in network for network in METADATA) or (serving() and not found.is_global):
        raise UrlNotAllowed(
            f"{host}: not allowed, it is {address}, an address inside; {VARIABLE} can name it"
        )


async def web_session(**options: Any) -> Any:
    """Return aiohttp's session for fsspec, which looks at each address that it is about to connect
    to.

    Redirects and names that mean another address a moment later come by here as well. Nothing is
    fetched from where clouds keep a machine's credentials; a served model connects to public
    addresses alone. An address that the operator named is open, but no other on the same server.
    """
    import aiohttp
    from aiohttp.resolver import ThreadedResolver

    class Resolver(ThreadedResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[Any]:
            found = await super().resolve(host, port, family)
            if not _named_server(host, port):  # the connector has seen to those
                for one in found:
                    _require_reachable(host, one["host"])
            return found

    class Connector(aiohttp.TCPConnector):
        async def connect(self, req: Any, *rest: Any, **named: Any) -> Any:
            host, port = req.url.raw_host, req.url.port
            if not _named(str(req.url)):
                try:
                    addresses = [str(ipaddress.ip_address(host))]
                # a name, for the resolver, which is not asked again for a connection that is kept
                except ValueError:
                    known = _named_server(host, port)
                    found = (
                        await ThreadedResolver().resolve(host, port, socket.AF_UNSPEC)
                        if known
                        else []
                    )
                    addresses = [one["host"] for one in found]
                for address in addresses:
                    _require_reachable(host, address)
            return await super().connect(req, *rest, **named)

    return aiohttp.ClientSession(connector=Connector(resolver=Resolver()), **options)
