"""What may import what: the library stays below the pipelines, and training needs few packages."""

import ast
import re
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


LIBRARY = ROOT / "model_lib"
LAYERS = (
    ("cli",),
    ("steps",),
    ("registry", "batch"),
    ("evaluate", "train"),
    ("ingest",),
    ("data", "scores"),
    ("model",),
    ("tracking", "pages"),
)
"""The packages of the library, each above those that it may import; the library's other modules lie
below them all."""


@pytest.mark.parametrize(
    "file", sorted(LIBRARY.rglob("*.py")), ids=lambda file: str(file.relative_to(LIBRARY))
)
def test_the_library_never_reaches_up(file: Path) -> None:
    assert not imported(file) & FORBIDDEN


def arrows(types: bool) -> dict[str, set[str]]:
    """Return for each module of the library those that it imports, at its top, where they are used,
    or as types."""
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in LIBRARY.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        tree = ast.parse(file.read_text())
        nodes = list(ast.walk(tree))
        as_types = [
            node
            for node in nodes
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ]
        skipped = set() if types else {inner for node in as_types for inner in ast.walk(node)}
        imports = [
            node for node in nodes if isinstance(node, ast.ImportFrom) and node not in skipped
        ]
        modules = {node.module or "" for node in imports}
        names = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        names |= {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        found[name] = (modules | names) & files.keys()
    return found


def test_no_arrow_of_the_library_points_backwards() -> None:
    """But one: `Captioner.caption` is there so that a user needs one name, and calls what is built
    on the model."""
    left = arrows(types=False)
    left["model_lib.model.captioner"].remove("model_lib.model.captioning")
    while ready := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in ready}
    assert not left, "these modules import one another in a circle"


def test_packages_import_only_what_lies_below_them() -> None:
    height = {
        package: len(LAYERS) - number
        for number, packages in enumerate(LAYERS)
        for package in packages
    }
    assert height.keys() == {
        "cli",
        *(folder.name for folder in LIBRARY.iterdir() if (folder / "__init__.py").exists()),
    }
    for module, needs in arrows(types=True).items():
        if module in ("model_lib.__init__", "model_lib.__main__"):
            continue
        above = module.split(".")[1]
        for needed in needs - {"model_lib.__init__"}:
            below = needed.split(".")[1]
            both_on_the_ground = not {above, below} & height.keys()
            assert (
                above == below or both_on_the_ground or height.get(above, 0) > height.get(below, 0)
            ), (module, needed)


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    modules = {
        file.name for package in (LIBRARY, ROOT / "pipelines") for file in package.rglob("*.py")
    }
    assert {name for name in modules if name[0] != "_"} == set(re.findall(r"`(\w+\.py)`", page))


PYTHON = [
    file
    for name in ("benchmarks", "components", "model_lib", "pipelines", "tests")
    for file in ROOT.glob(f"{name}/**/*.py")
]


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: str(file.relative_to(ROOT)))
def test_each_file_says_what_it_is_for_and_is_short(file: Path) -> None:
    text = file.read_text()
    assert not text or ast.get_docstring(ast.parse(text))
    assert text.count("\n") < 400


def python(code: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, cwd=ROOT)


def test_importing_the_library_and_ingesting_need_no_torch(scenes: Path, tmp_path: Path) -> None:
    python(
        "import sys, model_lib\n"
        "from model_lib.ingest.config import IngestConfig\n"
        "from model_lib.ingest.ingesting import ingest\n"
        "ingest(IngestConfig(dataset=sys.argv[1], output=sys.argv[2]))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n",
        scenes,
        tmp_path,
    )


def test_help_waits_for_no_package_that_takes_long() -> None:
    python(
        "import contextlib, sys\n"
        "from model_lib.cli import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        "assert 'pipelines.run' in sys.modules\n"
        "assert not {'kfp', 'mlflow', 'torch', 'transformers'} & sys.modules.keys()\n",
    )


def test_training_and_captioning_work_with_the_bare_packages(
    data: Path, scenes: Path, tmp_path: Path
) -> None:
    """On a GPU machine there are torch, transformers, pillow, pyarrow, fsspec and numpy, and what
    those need."""
    python(
        "import sys\n"
        "for name in ('mlflow', 'kfp', 'tyro', 'jinja2', 'pycocoevalcap', 'gcsfs', 'pandas'):\n"
        "    sys.modules[name] = None\n"
        "from model_lib import Captioner, generate_caption\n"
        "from model_lib.train.config import TrainConfig\n"
        "from model_lib.train.training import train\n"
        "made = train(TrainConfig(data=sys.argv[1], output=sys.argv[2], preset='tiny', epochs=1))\n"
        "generate_caption(Captioner.from_pretrained(made.model), sys.argv[3], num_beams=2)\n",
        data,
        tmp_path,
        scenes / "val2017" / "000000000001.jpg",
    )
