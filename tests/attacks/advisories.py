"""Compares the pinned packages with a copy of PyPA's advisory database, where PyPI itself cannot be
asked.

    git clone https://github.com/pypa/advisory-database
    make audit ADVISORIES=advisory-database

It prints each advisory that a pinned version falls under and how many there are, and exits with 1
if there is one. The format is that of https://ossf.github.io/osv-schema.
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PINS = Path(__file__).parents[2] / "constraints.txt"


def pinned() -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in PINS.read_text().splitlines()]
    pairs = [line.partition(";")[0].split("==") for line in lines if "==" in line]
    return {canonicalize_name(name.strip()): Version(version.strip()) for name, version in pairs}


def affected(version: Version, package: dict[str, Any]) -> bool:
    """Return whether an advisory's entry of a package, its versions and its ranges, holds a
    version."""
    for listed in package.get("versions", []):
        try:
            if Version(listed) == version:
                return True
        except InvalidVersion:  # some of the oldest are none
            continue
    for span in package.get("ranges", []):
        if span["type"] != "ECOSYSTEM":
            continue
        inside = False
        for event in span["events"]:  # in the order of their versions
            ((kind, bound),) = event.items()
            passed = bound == "0" or version >= Version(bound)
            if kind == "introduced" and passed:
                inside = True
            elif (kind == "fixed" and passed) or (
                kind == "last_affected" and version > Version(bound)
            ):
                inside = False
        if inside:
            return True
    return False


def main(database: str) -> int:
    pins, looked, vulnerable = pinned(), 0, 0
    for name, version in pins.items():
        for file in sorted(Path(database, "vulns", name).glob("*.yaml")):
            advisory = yaml.safe_load(file.read_text())
            looked += 1
            if "withdrawn" in advisory:
                continue
            if any(affected(version, package) for package in advisory["affected"]):
                vulnerable += 1
                aliases = ", ".join(advisory.get("aliases", []))
                print(f"{name} {version}: {advisory['id']} {aliases}")
    count = f"{vulnerable} of {looked} advisories for {len(pins)} pinned packages"
    print(f"{count} hold for the pinned versions")
    return int(vulnerable > 0)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "vulns").is_dir():
        sys.exit(
            "advisories: give the folder of a copy of https://github.com/pypa/advisory-database"
        )
    sys.exit(main(sys.argv[1]))
