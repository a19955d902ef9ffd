"""The documents: every command in them is run here or by a test that is named, or says what it
needs."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CLUSTER = ROOT / "docs" / "cluster.md"
"""Its commands need a cluster; `test_deploy.py` checks what can be checked of them."""
COMMANDS = (
    "captioner",
    "make",
    "mlflow",
    "curl",
    "pip",
    "python",
    "pytest",
    "docker",
    "kubectl",
    "gcloud",
)
SMALLER = {
    "scenes": ["--train", "64", "--val", "12", "--size", "64"],
    "train": ["--epochs", "1"],
    "compile": ["--output", "compiled"],
}
"""Options that are added to a command, so that it takes seconds."""
EXIT = {"captioner rollback": 2}
"""There is no champion before the first one, and the command says so."""
SERVING, VERSIONS = (
    "tests/model_lib/registry/test_serving.py",
    "tests/model_lib/registry/test_versions.py",
)
RUN_BY = {
    "make demo": "tests/pipelines/test_run.py"
    "::test_from_scenes_to_captions_by_the_better_of_winner_and_champion",
    "make test": "tests/test_documents.py::test_every_command_is_run_or_says_what_it_needs",
    "make soak": "tests/attacks/test_kills.py::test_train",
    "make fuzz": "tests/attacks/test_readers.py::test_what_is_whole_is_read",
    "mlflow models serve": f"{SERVING}::test_a_path_an_address_and_base64_are_captioned",
    "curl localhost:5001/invocations": f"{SERVING}::test_what_is_no_image_is_refused_by_row",
    "captioner models": f"{VERSIONS}::test_rolling_back_goes_back_version_by_version",
    "captioner rollback": f"{VERSIONS}::test_rolling_back_goes_back_version_by_version",
}
"""What runs the commands that begin with these words, where this file does not; only the servers'
take more."""
PROCESS = """
import json, sys
from model_lib.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as stop:
        print("EXIT", json.dumps([words, stop.code or 0]), flush=True)
"""


def commands(page: Path) -> list[str]:
    """Return the commands of a page's blocks, which are indented by four or six spaces, with their
    comments."""
    text = page.read_text().replace("\\\n", " ")
    lines = [
        re.sub(r"^ {4,6}(?:\$ )?(?:CAPTIONER_\w+=\S+ )?(?:\.venv/bin/)?", "", line)
        for line in text.splitlines()
        if line.startswith("    ")
    ]
    return [line for line in lines if line.split(" ")[0] in COMMANDS]


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def of_block(page: Path, first: str, last: str) -> list[str]:
    """Return the commands from one to another that nothing is needed for."""
    found = commands(page)
    start = next(n for n, line in enumerate(found) if line.startswith(first))
    end = next(n for n, line in enumerate(found) if line.startswith(last) and n >= start)
    return [line for line in found[start : end + 1] if "# needs" not in line]


STAGES = of_block(
    ROOT / "README.md", "captioner scenes", "captioner register --evaluations evaluated-other"
)
SECOND = of_block(
    ROOT / "docs" / "training.md", "captioner train --data data --output out2", "captioner train"
)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != CLUSTER], ids=lambda page: page.name
)
def test_every_command_is_run_or_says_what_it_needs(page: Path) -> None:
    for command in commands(page):
        if command in STAGES or command in SECOND or re.search(r"#.*\bneeds\b", command):
            continue
        given = words(command)
        named = [start for start in RUN_BY if given[: len(start.split())] == start.split()]
        assert named and (given == named[0].split() or named[0].startswith(("mlflow", "curl"))), (
            command
        )
        file, _, test = RUN_BY[named[0]].partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_pytest_command_that_is_named_selects_tests(page: Path) -> None:
    for arguments in re.findall(r"`pytest ([^`]*)`", page.read_text()):
        paths, _, wanted = arguments.partition(" -k ")
        tests = [
            name
            for path in paths.split()
            for name in re.findall(r"def (test_\w+)", (ROOT / path).read_text())
        ]
        assert any(wanted in name for name in tests), arguments


def test_tests_that_are_named_are_there() -> None:
    there = {
        name
        for file in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for page in PAGES:
        assert set(re.findall(r"`(test_\w+)`", page.read_text())) <= there, page.name


def test_the_commands_and_the_python_of_the_readme_work(tmp_path: Path) -> None:
    given = [words(command)[1:] for command in [*STAGES, *SECOND]]
    run = [
        [*command, *(option for option in SMALLER.get(command[0], []) if "--epochs" not in command)]
        for command in given
    ]
    process = [sys.executable, "-c", PROCESS, json.dumps(run)]
    done = subprocess.run(process, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    exits = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("EXIT ")]
    assert len(exits) == len(run), done.stderr
    for command, (_, code) in zip([*STAGES, *SECOND], exits, strict=True):
        assert code == EXIT.get(shlex.join(words(command)), 0), (command, done.stderr)

    block = (ROOT / "README.md").read_text().partition("## From Python\n\n")[2].partition("\n\n")[0]
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "best").symlink_to(tmp_path / "out" / "best")
    shutil.copy(tmp_path / "scenes" / "val2017" / "000000000001.jpg", tmp_path / "image.jpg")
    python = re.sub("^    ", "", block, flags=re.MULTILINE) + "\nprint('SAID', caption)"
    said = subprocess.run(
        [sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert re.search(r"SAID \w+", said.stdout)


def test_every_link_between_documents_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
