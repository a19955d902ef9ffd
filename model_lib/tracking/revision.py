"""The version of the running code: captioner's, and its git commit where that is known."""

import subprocess
from contextlib import suppress
from pathlib import Path

import model_lib

VERSION_TAG = "captioner.version"
COMMIT_TAG = "mlflow.source.git.commit"


def code_version(command: str) -> dict[str, str]:
    """Return the tags for a run's source: captioner's command, version and git commit.

    An image has the commit from which it was built in a file. A working copy has its own, with
    "-dirty" if files were changed.
    """
    tags = {VERSION_TAG: model_lib.__version__, "mlflow.source.name": f"captioner {command}"}
    tags["mlflow.source.type"] = "LOCAL"
    package = Path(model_lib.__file__).parent
    if (package / "REVISION").exists():
        tags[COMMIT_TAG] = (package / "REVISION").read_text().strip()
        return tags
    with suppress(OSError, subprocess.SubprocessError):
        # Fails if the repository around the package is another one's.
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        describe = ("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
        tags[COMMIT_TAG] = _git(package, *describe)
    return tags


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return process.stdout.strip()
