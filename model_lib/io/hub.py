"""Models on the Hugging Face hub: `owner/name`, or `owner/name@revision` (a tag, branch or commit).

A model's files are read from one commit, in the hub's own cache, also when the hub is away.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_lib.errors import UserError, WorkError, first_line

WEIGHTS = "model*.safetensors"
FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Configurations, tokenizers and chat templates."""
REMEDY = "mirror it into a bucket and name that URI, or let this machine reach the hub"


def split_revision(name: str) -> tuple[str, str | None]:
    """Return the repository and the revision of `owner/name@revision`."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Raise an error of the hub's client as a `UserError` or `WorkError` that has the remedy."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError as error:
        message = f"{name}: no such folder, and not a hub name of the form owner/name[@revision]"
        raise UserError(message) from error
    except errors.RevisionNotFoundError as error:
        revision = split_revision(name)[1]
        raise UserError(f"{name}: the hub's repository has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        problem = "no such folder, and no such model on the hub (or HF_TOKEN may not read it)"
        raise UserError(f"{name}: {problem}; {REMEDY}") from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            problem = f"not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set"
            raise UserError(f"{name}: no such folder, and {problem}") from error
        problem = f"the hub cannot be reached ({first_line(error.__cause__ or error)})"
        raise WorkError(f"{name}: {problem}; {REMEDY}") from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{name}: the hub's repository has no model or tokenizer (config.json, tokenizer.json)"
        ) from error
    except errors.HfHubHTTPError as error:
        raise WorkError(f"{name}: the hub failed: {first_line(error)}") from error
    except OSError as error:
        if error.filename is None:
            raise WorkError(f"{name}: the hub cannot be reached ({error}); {REMEDY}") from error
        problem = f"cannot be written ({error.strerror})"
        raise UserError(
            f"{constants.HF_HUB_CACHE}: the cache of hub models {problem}; HF_HOME moves it"
        ) from error


def download_model(name: str, subfolder: str = "", weights: bool = True, **options: Any) -> str:
    """Return a local folder with the configurations, tokenizer and weights of a hub model.

    Args:
        name: owner/name[@revision].
        subfolder: of the repository.
        weights: whether safetensors weights are needed.
        options: of `huggingface_hub.snapshot_download`: revision, cache_dir, token, …

    Raises:
        UserError: there is no such model, or the cache cannot be written.
        WorkError: the hub failed, and the model is not in its cache.
    """
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(name)
    patterns = [f"{subfolder}/{file}" if subfolder else file for file in FILES]
    if weights:
        patterns.append(f"{subfolder}/{WEIGHTS}" if subfolder else WEIGHTS)
    with hub_errors(name):
        folder = snapshot_download(
            repository,
            allow_patterns=patterns,
            ignore_patterns=None if subfolder else "*/*",
            **{"revision": revision, **options},
        )
    return str(Path(folder, subfolder))


def pin_revision(name: str) -> str:
    """Return `owner/name@commit` of what a hub name stands for now; raises as `download_model`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    repository, revision = split_revision(name)
    with hub_errors(name):
        try:
            file = hf_hub_download(repository, "config.json", revision=revision)
        except RemoteEntryNotFoundError:  # a tokenizer alone
            file = hf_hub_download(repository, "tokenizer.json", revision=revision)
    return f"{repository}@{Path(file).parent.name}"  # snapshots/<commit>/config.json


def create_repository(name: str) -> None:
    """Create a private repository for a model, unless it is there.

    Raises:
        UserError: the name is none, or HF_TOKEN may not create it.
        WorkError: the hub failed.
    """
    from huggingface_hub import HfApi

    with hub_errors(name), _writing(name):
        HfApi().create_repo(name, private=True, exist_ok=True)


def upload_folder(folder: str, name: str) -> str:
    """Commit the files of a local folder to a repository; return the commit's address.

    Raises as `create_repository`.
    """
    from huggingface_hub import HfApi

    with hub_errors(name), _writing(name):
        commit = HfApi().upload_folder(
            repo_id=name, folder_path=folder, commit_message="Upload by captioner export"
        )
    return str(commit.commit_url)


@contextlib.contextmanager
def _writing(name: str) -> Iterator[None]:
    """Raise a `UserError` where the hub refuses to write, and a `WorkError` where files are lost on
    their way."""
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        message = f"{name}: the hub refuses to write there: {first_line(error)}"
        raise UserError(f"{message}; set HF_TOKEN to one that may") from error
    except (httpx.HTTPError, RuntimeError) as error:
        problem = first_line(error.__cause__ or error)
        raise WorkError(f"{name}: cannot be uploaded to the hub: {problem}") from error
