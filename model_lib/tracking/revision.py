"""Which code runs: captioner's version, and its git commit where that is known."""

import subprocess
from pathlib import Path

import model_lib

VERSION_TAG = "captioner.version"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def code_version() -> dict[str, str]:
    """Return the tags that say which code runs: captioner's version, and its git commit where that
    is known.

    An image knows the commit that it was built from, a working copy its own, marked if files were
    changed.
    """
    tags = {VERSION_TAG: model_lib.__version__}
    package = Path(model_lib.__file__).parent
    if (package / "REVISION").exists():
        revision = (package / "REVISION").read_text().strip()
    else:
        try:
            _git(
                package, "ls-files", "--error-unmatch", "__init__.py"
            )  # else the repository around is another's
            revision = _git(
                package, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"
            )
        except (OSError, subprocess.SubprocessError):
            revision = ""
    return tags | ({"mlflow.source.git.commit": revision} if revision else {})
