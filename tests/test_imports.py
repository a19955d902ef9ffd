"""Which packages a command needs: training and ingesting start fast, and need few of them.

Which module may import which is a contract of import-linter, in pyproject.toml.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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


def test_original_images_are_ingested_without_codecs(scenes: Path, tmp_path: Path) -> None:
    python(
        "import sys\n"
        "for name in ('simplejpeg', 'cykooz_resizer', 'tyro'):\n"
        "    sys.modules[name] = None\n"
        "from model_lib.ingest.config import IngestConfig\n"
        "from model_lib.ingest.ingesting import ingest\n"
        "config = IngestConfig(dataset=sys.argv[1], output=sys.argv[2], store='original')\n"
        "assert not ingest(config).quarantined\n",
        scenes,
        tmp_path,
    )


def test_help_imports_no_slow_package() -> None:
    python(
        "import contextlib, sys\n"
        "from model_lib.cli import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        "assert 'pipelines.run' in sys.modules\n"
        "assert not {'gradio', 'kfp', 'mlflow', 'torch', 'transformers'} & sys.modules.keys()\n",
    )


def test_training_and_captioning_work_with_the_bare_packages(
    data: Path, scenes: Path, tmp_path: Path
) -> None:
    """A GPU machine has torch, transformers, pillow, pyarrow, fsspec, numpy, pydantic, tenacity and
    filelock; with tyro, the command line works too."""
    python(
        "import sys\n"
        "for name in ('mlflow', 'kfp', 'jinja2', 'pycocoevalcap', 'gcsfs', 'pandas', 'ijson',\n"
        "    'tyro', 'simplejpeg', 'cykooz_resizer'):\n"
        "    sys.modules[name] = None\n"
        "from model_lib import Captioner, generate_caption\n"
        "from model_lib.train.config import TrainConfig\n"
        "from model_lib.train.training import train\n"
        "config = TrainConfig(data=sys.argv[1], output=sys.argv[2], preset='tiny', epochs=1)\n"
        "model = Captioner.from_pretrained(train(config).model)\n"
        "generate_caption(model, sys.argv[3], num_beams=2)\n",
        data,
        tmp_path,
        scenes / "val2017" / "000000000001.jpg",
    )


@pytest.mark.parametrize(
    ("module", "package", "command"),
    [
        ("tyro", "tyro", "caption -f a.jpg"),
        ("PIL", "pillow", "ingest --dataset {scenes} --output {out}"),
        ("simplejpeg", "simplejpeg", "ingest --dataset {scenes} --output {out}"),
        ("gradio", "gradio", "app"),
        ("uvicorn", "uvicorn", "serve --model {out}"),
    ],
)
def test_a_needed_package_that_is_missing_is_one_line_at_once(
    scenes: Path, tmp_path: Path, module: str, package: str, command: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
    options = command.format(scenes=scenes, out=tmp_path / "out").split()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "model_lib", *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    line = f"captioner: error: needs {package}, which is not installed: pip install {package}\n"
    assert (done.returncode, done.stderr) == (2, line)
    assert not (tmp_path / "out").exists()
