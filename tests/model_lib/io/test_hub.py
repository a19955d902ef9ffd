"""Models from a hub on loopback: one commit, the hub's cache, and errors in one line."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from model_lib import Captioner, UserError
from model_lib.errors import WorkError
from model_lib.io.remote_cache import cached
from model_lib.model.sources import lasting_source, model_folder
from tests.helpers.hub import Hub, running_hub, use_hub
from tests.helpers.small import small_model

OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture()
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture()
def captioners(hub: Hub, tmp_path: Path) -> Hub:
    """Two commits of a captioner: the older one is tagged v1."""
    for commit, seed, revision in ((OLD, 0, "v1"), (NEW, 1, "main")):
        small_model(seed, vocab_size=300 + seed).save_pretrained(tmp_path / commit)
        hub.push("team/captioner", commit, tmp_path / commit, revision)
    return hub


@pytest.mark.parametrize(
    ("name", "options", "vocabulary"),
    [
        ("team/captioner", {}, 301),
        ("team/captioner", {"revision": "v1"}, 300),
        ("team/captioner@v1", {}, 300),
        (f"team/captioner@{OLD}", {}, 300),
    ],
)
def test_weights_and_tokenizer_are_those_of_one_revision(
    captioners: Hub, tmp_path: Path, name: str, options: dict, vocabulary: int
) -> None:
    cache = tmp_path / "other"
    model = Captioner.from_pretrained(name, token="hf_x", cache_dir=str(cache), **options)
    assert model.config.decoder_config.vocab_size == vocabulary
    assert captioners.tokens == {"Bearer hf_x"}
    commits = {file.name for file in cache.glob("models--team--captioner/snapshots/*")}
    assert commits == {OLD if vocabulary == 300 else NEW} and not (tmp_path / "cache").exists()


def test_a_subfolder_holds_for_all_files(hub: Hub, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "repository" / "best")
    hub.push("team/runs", NEW, tmp_path / "repository", "main")
    assert Captioner.from_pretrained("team/runs", subfolder="best").tokenizer is not None
    assert Captioner.from_pretrained(str(tmp_path / "repository"), subfolder="best")


def test_a_name_is_pinned_to_its_commit_and_loads_again_without_the_hub(
    captioners: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = lasting_source("team/captioner@v1")
    assert pinned == f"team/captioner@{OLD}" and lasting_source(pinned) == pinned
    folder = model_folder(pinned)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert lasting_source("team/captioner@v1") == pinned
    assert model_folder("team/captioner@v1") == folder
    with pytest.raises(UserError, match=r"team/captioner: .*cache.*HF_HUB_OFFLINE is set"):
        model_folder("team/captioner")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("team/none", r"team/none: .*no such model on the hub \(or HF_TOKEN may not read it\)"),
        ("team/captioner@v9", "team/captioner@v9: the hub's repository has no revision v9"),
        ("a/b/c", r"a/b/c: no such folder, and not a hub name"),
        ("what a name", r"what a name: no such folder, and not a hub name"),
    ],
)
def test_what_the_hub_does_not_have_is_refused_in_one_line(
    captioners: Hub, name: str, message: str
) -> None:
    for call in (model_folder, lasting_source):
        with pytest.raises(UserError, match=message) as refused:
            call(name)
        assert "\n" not in str(refused.value)


def test_a_hub_that_is_away_is_named_with_the_remedy(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's retries
    with pytest.raises(WorkError, match=r"team/x: the hub cannot be reached .*; mirror it"):
        lasting_source("team/x")


def test_a_cache_that_cannot_be_written_is_named(
    captioners: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/nope")
    with pytest.raises(UserError, match=r"/proc/nope: the cache of hub models .*HF_HOME moves it"):
        model_folder("team/captioner")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nope")
    with pytest.raises(UserError, match=r"/proc/nope/captioner: .*XDG_CACHE_HOME moves it"):
        cached(["key"], lambda part: None)
