"""What may import what: the library stays below the pipelines, and training needs few packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"kfp", "components", "pipelines", "tests", "benchmarks"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("file", sorted((ROOT / "model_lib").glob("*.py")), ids=lambda file: file.name)
def test_the_library_never_reaches_up(file: Path) -> None:
    assert not imported(file) & FORBIDDEN


def python(code: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, cwd=ROOT)


def test_importing_the_library_and_ingesting_need_no_torch(scenes: Path, tmp_path: Path) -> None:
    python(
        "import sys, model_lib\n"
        "from model_lib.config import IngestConfig\n"
        "from model_lib.ingest import ingest\n"
        "ingest(IngestConfig(dataset=sys.argv[1], output=sys.argv[2]))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n",
        scenes,
        tmp_path,
    )


def test_training_and_captioning_work_with_the_bare_packages(data: Path, scenes: Path, tmp_path: Path) -> None:
    """On a GPU machine there are torch, transformers, pillow, pyarrow, fsspec and numpy, and what those need."""
    python(
        "import sys\n"
        "for name in ('mlflow', 'kfp', 'tyro', 'jinja2', 'pycocoevalcap', 'gcsfs', 'pandas'):\n"
        "    sys.modules[name] = None\n"
        "from model_lib import Captioner, generate_caption\n"
        "from model_lib.config import TrainConfig\n"
        "from model_lib.training import train\n"
        "made = train(TrainConfig(data=sys.argv[1], output=sys.argv[2], preset='tiny', epochs=1))\n"
        "generate_caption(Captioner.from_pretrained(made.model), sys.argv[3], num_beams=2)\n",
        data,
        tmp_path,
        scenes / "val2017" / "000000000001.jpg",
    )
