"""The version of the running code: captioner's, and its git commit where that is known."""

import subprocess
from pathlib import Path

import model_lib

VERSION_TAG = "captioner.version"


def code_version() -> dict[str, str]:
    """Return the tags for the running code's version and git commit.

    An image has the commit from which it was built in a file. A working copy has its own, with
    "-dirty" if files were changed.
    """
    tags = {VERSION_TAG: model_lib.__version__}
    package = Path(model_lib.__file__).parent
    if (package / "REVISION").exists():
        revision = (package / "REVISION").read_text().strip()
    else:
        try:
            # Fails if the repository around the package is another one's.
            _git(package, "ls-files", "--error-unmatch", "__init__.py")
            revision = _git(
                package, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"
            )
        except (OSError, subprocess.SubprocessError):
            revision = ""
    return tags | ({"mlflow.source.git.commit": revision} if revision else {})


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return process.stdout.strip()
