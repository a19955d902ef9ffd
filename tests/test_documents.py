"""The documents: every command in them is run here or by a named test, or says what it needs."""

import csv
import json
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.warm_python import warm_python

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
CLUSTER = ROOT / "docs" / "cluster.md"
"""Its commands need a cluster; `test_deploy.py` checks what can be checked of them."""
TUTORIAL = [ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "training.md"]
"""Pages whose commands are run here, one after another in one folder."""
PROGRAMS = ("captioner", "make", "mlflow", "curl", "pip", "python", "pytest", "docker", "gcloud")
SMALLER = {
    "scenes": ["--train", "64", "--val", "12", "--size", "64"],
    "train": ["--epochs", "1"],
}
"""Options that are added to a command, so that it takes seconds."""
SERVING = "tests/model_lib/registry/test_serving.py"
VERSIONS = "tests/model_lib/registry/test_versions.py"
RUN_BY = {
    "make demo": "tests/pipelines/test_run.py",
    "make test": "tests/test_documents.py",
    "make soak": "tests/attacks/test_kills.py",
    "make fuzz": "tests/attacks/test_readers.py",
    "mlflow models serve": SERVING,
    "curl localhost:5001/invocations": SERVING,
    "captioner doctor": "tests/model_lib/steps/test_doctor.py",
    "captioner export": "tests/model_lib/registry/test_export.py",
    "captioner app": "tests/model_lib/app/test_app.py",
    "captioner models": VERSIONS,
    "captioner rollback": VERSIONS,
}
"""The tests of commands that begin so and are not run here."""
PROCESS = """
import json, sys
from model_lib.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as stop:
        if stop.code:
            sys.exit(f"{words} ended with {stop.code}")
"""


def commands(page: Path) -> list[str]:
    """Return the commands in a page's indented blocks, with their comments."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(
        r"^ {4,6}(?:\$ )?(?:CAPTIONER_\w+=\S+ )?(?:\.venv/bin/)?(.*)", text, re.MULTILINE
    )
    return [line for line in lines if line.split(" ")[0] in PROGRAMS]


def is_run_here(page: Path, command: str) -> bool:
    return page in TUTORIAL and command.startswith("captioner") and not is_run_elsewhere(command)


def is_run_elsewhere(command: str) -> bool:
    return re.search(r"#.*\bneeds\b", command) is not None or command.startswith((*RUN_BY,))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != CLUSTER], ids=lambda page: page.name
)
def test_every_command_is_run_or_says_what_it_needs(page: Path) -> None:
    for command in commands(page):
        assert is_run_here(page, command) or is_run_elsewhere(command), command


def test_files_that_are_named_exist() -> None:
    folders = ("benchmarks", "components", "docs", "model_lib", "pipelines", "tests")
    names = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    for file in RUN_BY.values():
        assert (ROOT / file).exists(), file
    for page in PAGES:
        for file in re.findall(r"`([\w/]+\.py)`", page.read_text()):
            assert Path(file).name in names, f"{page.name}: {file}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_pytest_command_that_is_named_selects_tests(page: Path) -> None:
    for arguments in re.findall(r"`pytest ([^`]*)`", page.read_text()):
        paths, _, keyword = arguments.partition(" -k ")
        text = "".join((ROOT / path).read_text() for path in paths.split())
        assert any(keyword in name for name in re.findall(r"def (test_\w+)", text)), arguments


@pytest.fixture()
def photos(coco: Path, tmp_path: Path) -> Path:
    """A folder of photographs with captions.csv, as the README has it."""
    folder = tmp_path / "photos"
    shutil.copytree(coco / "train2017", folder)
    document = json.loads((coco / "annotations" / "captions_train2017.json").read_text())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption"])
        rows.writerows(
            [names[note["image_id"]], note["caption"]] for note in document["annotations"]
        )
    return folder


@pytest.mark.usefixtures("photos")
def test_the_commands_and_the_python_of_the_readme_work(tmp_path: Path) -> None:
    arguments = [
        shlex.split(command, comments=True)[1:]
        for page in TUTORIAL
        for command in commands(page)
        if is_run_here(page, command)
    ]
    for words in arguments:
        if "--epochs" not in words:
            words += SMALLER.get(words[0], [])
    command = [warm_python(), "-c", PROCESS, json.dumps(arguments)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=600)

    block = (ROOT / "README.md").read_text().partition("## From Python\n\n")[2].partition("\n\n")[0]
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "best").symlink_to(tmp_path / "out" / "best")
    shutil.copy(tmp_path / "scenes" / "val2017" / "000000000001.jpg", tmp_path / "image.jpg")
    python = re.sub("^    ", "", block, flags=re.MULTILINE) + "\nprint(caption)"
    output = subprocess.check_output([warm_python(), "-c", python], cwd=tmp_path, text=True)
    assert re.search(r"\w", output)


def test_every_link_between_documents_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_drawing_has_the_layers_that_are_checked() -> None:
    drawing = runpy.run_path(str(ROOT / "docs" / "draw.py"))["drawing"]()
    assert (ROOT / "docs" / "architecture.svg").read_text() == drawing, "run docs/draw.py"
