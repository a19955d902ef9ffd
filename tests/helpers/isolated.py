"""A Python with chosen packages and what they require, and nothing else of this environment."""

import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def link_packages(folder: Path, *names: str) -> Path:
    """Fill a folder with links to installed packages and those that they require; return it."""
    folder.mkdir()
    todo, linked = list(names), set[str]()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in linked:
            continue
        linked.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        requirements = map(Requirement, package.requires or [])
        todo += [r.name for r in requirements if r.marker is None or r.marker.evaluate()]
        for part in _top_level(package):
            if not (folder / part.name).is_symlink():
                (folder / part.name).symlink_to(part)
    return folder


def _top_level(package: Distribution) -> set[Path]:
    root = Path(str(package.locate_file("")))
    parts = {file.parts[0] for file in package.files or [] if file.parts[0] != ".."}
    return {root / part for part in parts - {"__pycache__"}}


def run_isolated(packages: Path, cwd: Path, code: str, *arguments: object) -> str:
    """Run code with `link_packages`' folder alone beside Python's own library; return stdout."""
    start = f"import sys; sys.path.append({str(packages)!r})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + code, *map(str, arguments)],
        cwd=cwd,
        env={
            "PATH": os.environ["PATH"],
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(cwd / "hf"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
