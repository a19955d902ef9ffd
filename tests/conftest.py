"""Fixtures: real test data where it is at hand, a small data set of generated scenes, and small
random models.

They import what they need themselves: the process that hands out the tests reads this file and
needs none of it.
"""

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Read at import by the packages that are tested.
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks a hub is a mistake
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # the emulator has no such buckets
os.environ["OMP_NUM_THREADS"] = "1"  # sums are the same however many tests run side by side
os.environ["NO_GCE_CHECK"] = "true"  # Google's drivers look for its metadata server for long
# METEOR takes seven seconds to start: only tests with the fixture `java` have Java.
if "PATH_WITH_JAVA" not in os.environ:
    os.environ["PATH_WITH_JAVA"] = os.environ["PATH"]
    os.environ["PATH"] = tempfile.mkdtemp(prefix="without-java-")
    atexit.register(shutil.rmtree, os.environ["PATH"])
    programs = {}
    for folder in filter(os.path.isdir, reversed(os.environ["PATH_WITH_JAVA"].split(os.pathsep))):
        programs.update({file.name: file.path for file in os.scandir(folder)})
    programs.pop("java", None)
    for name, program in programs.items():
        os.symlink(os.path.abspath(program), f"{os.environ['PATH']}/{name}")

import pytest

from tests.helpers.warm_python import warm_python

if TYPE_CHECKING:
    from model_lib.model.captioner import Captioner

LONGEST = ["mlflow_down", "bucket", "survival", "distributed", "training", "run", "trainjob"]
LONGEST += ["secrets", "batch", "cli", "tracking", "mlflow_ui", "evaluation", "documents", "images"]
LONGEST += ["serving", "registry", "faults", "model"]
"""Files of tests that take longest, the longest first."""
SLOW_FIXTURES = frozenset(
    ["bucket", "captioner", "finished", "java", "page", "served", "small_disk", "with_java"]
)
"""Fixtures that start processes, a server, a browser or a training."""
SLOW_FILES = re.compile(
    "test_(candidates|closing|compare|distributed|doctor|download|export|faults|journal|merging|"
    "mlflow_ui|preflight|prepacking|promotion_race|registered_again|registry|rivals|scenes|server|serving|"
    "survival|tracking|training|trainjob|two_pods|versions).py"
)
"""Files of tests that start servers or other processes, or train."""

SHARED = Path(os.environ.get("CAPTIONER_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests, and begin with the longest files: one that began last would run alone."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if SLOW_FILES.fullmatch(item.path.name) or not SLOW_FIXTURES.isdisjoint(fixtures):
            item.add_marker("slow")
    order = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Restore the environment after each test, with MLflow's choice of a store."""
    before = dict(os.environ)
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)  # it changes the environment, too
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture()
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a pipeline's step, without the variables that a step may have."""
    from tests.helpers.tracked import NAMES

    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"test data {folder} is absent; CAPTIONER_TEST_DATA names the folder of all")
    return folder


@pytest.fixture(scope="session")
def coco() -> Path:
    """A subset of COCO 2017 in its own layout."""
    return _shared("coco")


@pytest.fixture(scope="session")
def coco_eval() -> Path:
    """The caption-evaluation case with the scores that it must give."""
    return _shared("coco_eval")


@pytest.fixture(scope="session")
def odd_images() -> Path:
    return _shared("odd_images")


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> Path:
    return _shared("gpt2_tokenizer")


@pytest.fixture()
def java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Java, for the official tokeniser and METEOR."""
    monkeypatch.setenv("PATH", os.environ["PATH_WITH_JAVA"])
    if shutil.which("java") is None:
        pytest.skip("the official scores need Java")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated scenes, 64 to train on and 12 of held-out combinations."""
    from model_lib.ingest.config import ScenesConfig
    from model_lib.ingest.scenes import make_scenes

    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(ScenesConfig(output=str(folder), train=64, val=12, size=64))
    return folder


def zipped(archive: Path, folder: Path, *parts: str) -> None:
    with zipfile.ZipFile(archive, "w") as archive_file:
        for part in parts:
            for file in sorted((folder / part).iterdir()):
                archive_file.write(file, f"{part}/{file.name}")


@pytest.fixture()
def archives(scenes: Path, tmp_path: Path) -> Path:
    """The scenes as COCO's own archives."""
    folder = tmp_path / "archives"
    folder.mkdir()
    zipped(folder / "annotations_trainval2017.zip", scenes, "annotations")
    for split in ("train2017", "val2017"):
        zipped(folder / f"{split}.zip", scenes, split)
    return folder


@pytest.fixture(scope="session")
def data(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes, ingested."""
    from model_lib.ingest.config import IngestConfig
    from model_lib.ingest.ingesting import ingest

    folder = tmp_path_factory.mktemp("data")
    ingest(IngestConfig(dataset=str(scenes), output=str(folder)))
    return folder


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of three epochs, preset tiny, that nothing disturbed."""
    from model_lib.train.config import TrainConfig
    from model_lib.train.training import train

    folder = tmp_path_factory.mktemp("finished")
    train(TrainConfig(data=str(data), output=str(folder), preset="tiny", epochs=3))
    return folder


@pytest.fixture()
def model() -> "Captioner":
    from tests.helpers.small import small_model

    return small_model()


@pytest.fixture()
def parts(tmp_path: Path, gpt2_tokenizer: Path) -> tuple[Path, Path]:
    """A whole CLIP (text tower too) and a GPT-2 of another width, saved as their hubs do."""
    from tests.helpers.small import save_parts

    return save_parts(tmp_path, gpt2_tokenizer)


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small captioner in a folder."""
    from tests.helpers.small import small_model

    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted: needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture()
def captioner(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs the command line in a process of its own, in an empty folder."""

    def run(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        return subprocess.run(
            [warm_python(), "-m", "model_lib", *map(str, arguments)],
            cwd=tmp_path,
            env={**kept, "COLUMNS": "200", **environment},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run
