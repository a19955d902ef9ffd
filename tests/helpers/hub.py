"""A Hugging Face hub on loopback, for the calls that its client makes to download models."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.helpers.http_server import Handler, serving


class Hub:
    """Repositories by name, each with commits by revision: a commit is a folder of files."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, tuple[str, Path]]] = {}
        self.tokens: set[str | None] = set()
        """Of the requests for models so far."""

    def push(self, repository: str, commit: str, folder: Path, *revisions: str) -> None:
        """Let revisions of a repository, and the commit (40 hex digits), be a folder's files."""
        for revision in (commit, *revisions):
            self.repositories.setdefault(repository, {})[revision] = (commit, folder)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the answer to a request."""
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        if len(parts) < 4:
            return 404, {}, b""
        owner, name, action, *rest = parts
        revisions = self.repositories.get(f"{owner}/{name}")
        if revisions is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if rest[0] not in revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit, folder = revisions[rest[0]]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = {str(file.relative_to(folder)): file for file in files}
        if action == "revision":
            siblings = [{"rfilename": file} for file in names]
            document = {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}
            return 200, {}, json.dumps(document).encode()
        if action == "tree":
            rows = [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": commit + path}
                for path, file in names.items()
            ]
            return 200, {}, json.dumps(rows).encode()
        file_name = "/".join(rest[1:])
        if file_name not in names:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        headers = {"X-Repo-Commit": commit, "ETag": f'"{commit}-{file_name.replace("/", "-")}"'}
        return 200, headers, names[file_name].read_bytes()


@contextmanager
def running_hub(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Run a hub that the client in this process asks, with an empty cache."""
    from huggingface_hub import constants

    hub = Hub()

    class Models(Handler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.count("/") > 2:
                hub.tokens.add(self.headers.get("Authorization"))
            status, headers, body = hub.answer(self.path)
            self.reply(status, body, headers.items())

        do_HEAD = do_GET

    with serving(Models) as address:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        use_hub(patch, address)
        yield hub


def use_hub(patch: pytest.MonkeyPatch, address: str) -> None:
    """Let the client in this process ask the hub at `address`."""
    from huggingface_hub import constants

    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
