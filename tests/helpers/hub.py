"""A Hugging Face hub on loopback, for the calls that its client makes to download models, and to
upload a folder (with git-LFS: the hub's newer storage, Xet, is a server of its own)."""

import base64
import hashlib
import json
import shutil
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
        self.writers: dict[str, str] = {}
        """By token the owner of the repositories that it may write to."""
        self.private: set[str] = set()
        """Names of the private repositories that were created."""
        self.objects: dict[str, bytes] = {}
        """Content of large files by SHA-256."""
        self.address, self.uploads = "", Path()
        """Where it answers, and the folder for the commits that it is sent."""

    def push(self, repository: str, commit: str, folder: Path, *revisions: str) -> None:
        """Let revisions of a repository, and the commit (40 hex digits), be a folder's files."""
        for revision in (commit, *revisions):
            self.repositories.setdefault(repository, {})[revision] = (commit, folder)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the answer to a request."""
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts == ["api", "models"]:
            return 200, {}, json.dumps([{"id": name} for name in self.repositories]).encode()
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

    def who(self, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the answer to a token's question whose it is."""
        owner = self.writers.get((token or "").removeprefix("Bearer "))
        if owner is None:
            return _refused(401, "Invalid credentials in Authorization header")
        return 200, {}, json.dumps({"name": owner, "type": "user"}).encode()

    def write(
        self, method: str, path: str, token: str | None, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the answer to a request that writes."""
        owner = self.writers.get((token or "").removeprefix("Bearer "))
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[0] == "objects":  # an address that the hub has given out; it asks for no token
            return self._store(method, parts[1], body)
        if owner is None:
            return _refused(401, "Invalid username or password.")
        document = [json.loads(line) for line in body.splitlines()]
        answer: dict = {}
        match parts:
            case ["api", "repos", "create"]:
                name = f"{document[0]['organization']}/{document[0]['name']}"
                if document[0]["organization"] != owner:
                    return _refused(403, f"You don't have the rights to create {name}")
                answer = {"url": f"{self.address}/{name}", "name": name}
                if name in self.repositories:
                    answer["error"] = "You already created this model repo"
                    return 409, {}, json.dumps(answer).encode()
                self.repositories[name] = {}
                if document[0].get("visibility") == "private":
                    self.private.add(name)
            case ["api", "validate-yaml"]:
                starts = document[0]["content"].startswith("---\n")
                answer = {"errors": [], "warnings": [] if starts else [{"message": "empty"}]}
            case ["api", "models", organization, _, _, _] if organization != owner:
                return _refused(403, "Forbidden: you must use a write token")
            case ["api", "models", _, repository, "preupload", revision]:
                _, folder = self.repositories[f"{owner}/{repository}"].get(revision, ("", None))
                answer["files"] = [
                    _upload_mode(file["path"], folder) for file in document[0]["files"]
                ]
            case [_, _, "info", "lfs", "objects", "batch"]:
                rows = document[0]["objects"]
                action = {name: f"{self.address}/objects/" for name in ("upload", "verify")}
                answer = {"transfer": "basic", "objects": rows}
                for row in rows:
                    if row["oid"] not in self.objects:
                        row["actions"] = {n: {"href": a + row["oid"]} for n, a in action.items()}
            case ["api", "models", organization, repository, "commit", revision]:
                return self._commit(f"{organization}/{repository}", revision, document)
        return 200, {}, json.dumps(answer).encode()

    def _store(self, method: str, oid: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if method == "PUT" and hashlib.sha256(body).hexdigest() == oid:
            self.objects[oid] = body
        return 200 if oid in self.objects else 422, {}, b"{}"

    def _commit(
        self, name: str, revision: str, rows: list[dict]
    ) -> tuple[int, dict[str, str], bytes]:
        parent, before = self.repositories[name].get(revision, ("", None))
        commit = hashlib.sha1(json.dumps([parent, rows]).encode()).hexdigest()
        files = {}
        for row in rows:
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return _refused(
                        422, f"LFS pointer pointed to a file that does not exist: {value}"
                    )
                files[value["path"]] = self.objects[value["oid"]]
        folder = self.uploads / commit
        if before is not None:  # a commit leaves what it does not name as it is
            shutil.copytree(before, folder)
        for path, content in files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        self.push(name, commit, folder, revision)
        answer = {"commitUrl": f"{self.address}/{name}/commit/{commit}", "commitOid": commit}
        return 200, {}, json.dumps(answer).encode()


def _upload_mode(path: str, folder: Path | None) -> dict:
    """Return how the client shall send a file, by the .gitattributes of a new repository, and the
    object id of the one that is there, which it leaves out if it is the same."""
    is_large = path.endswith(".safetensors")
    answer = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
    if folder is not None and (folder / path).is_file():
        content = (folder / path).read_bytes()
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content)
        answer["oid"] = (hashlib.sha256(content) if is_large else blob).hexdigest()
    return answer


def _refused(status: int, message: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Message": message}, json.dumps({"error": message}).encode()


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
            if self.path == "/api/whoami-v2":
                status, headers, body = hub.who(self.headers.get("Authorization"))
            self.reply(status, body, headers.items())

        do_HEAD = do_GET

        def do_POST(self) -> None:
            token, body = self.headers.get("Authorization"), self.body()
            status, headers, answer = hub.write(self.command, self.path, token, body)
            self.reply(status, answer, headers.items())

        do_PUT = do_POST

    with serving(Models) as address:
        hub.address, hub.uploads = address, cache.parent / "commits"
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
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
