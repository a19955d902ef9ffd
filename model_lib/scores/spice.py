"""SPICE, by pycocoevalcap's jar and the models of Stanford CoreNLP 3.6.0, which are fetched only
when asked for.

Anderson et al. 2016, "SPICE: Semantic Propositional Image Caption Evaluation".
"""

import json
import math
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from model_lib.errors import UserError, WorkError
from model_lib.io import storage

MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
MEMORY = "8G"
OPENED = ("java.lang", "java.math", "java.net", "java.text", "java.util", "java.util.concurrent")
"""Packages in which SPICE's serialisation looks at private fields, which Java forbids since its
version 16."""


def require_spice(folder: str) -> None:
    """Raise `UserError` unless `folder` has SPICE's models and there is Java."""
    if shutil.which("java") is None:
        raise UserError("SPICE needs Java (apt-get install default-jre-headless)")
    for name in MODELS:
        if not Path(folder, name).is_file():
            raise UserError(
                f"spice {folder}: has no {name}; fetch it: captioner download spice --output "
                f"{folder}"
            )


def unpack_models(archive: str, folder: str) -> None:
    """Put SPICE's models, which Java wants as files, from CoreNLP's zip archive into `folder`.

    Raises:
        WorkError: the archive is another one.
    """
    with storage.open_file(archive, 2**23) as file, zipfile.ZipFile(file) as zipped:
        members = {Path(name).name: name for name in zipped.namelist()}
        for name in MODELS:
            if name not in members:
                raise WorkError(f"{archive}: has no {name} in it; use another --base")
            with (
                zipped.open(members[name]) as model,
                storage.atomic_file(storage.join(folder, name)) as part,
                Path(part).open("wb") as target,
            ):
                shutil.copyfileobj(model, target)


def spice_scores(
    captions: Mapping[int, str], references: Mapping[int, Sequence[str]], folder: str
) -> np.ndarray:
    """Return the SPICE of each image's caption, float64 [images]; 0 where it has nothing to
    compare.

    Args:
        captions: by image id.
        references: by image id, at least those of `captions`.
        folder: with `MODELS`.

    Raises:
        UserError: there is no Java, or the folder has no models.
        WorkError: the program failed.
    """
    from pycocoevalcap.spice import spice

    require_spice(folder)
    home = Path(spice.__file__).parent
    classes = [
        home / spice.SPICE_JAR,
        *sorted((home / "lib").glob("*.jar")),
        *(Path(folder, name) for name in MODELS),
    ]
    rows = [
        {"image_id": i, "test": text, "refs": list(references[i])} for i, text in captions.items()
    ]
    opens = " ".join(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED)
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "captions.json"), Path(scratch, "scores.json")
        asked.write_text(json.dumps(rows))
        options = [
            str(asked),
            "-cache",
            f"{scratch}/cache",
            "-out",
            str(answered),
            "-subset",
            "-silent",
        ]
        done = subprocess.run(
            [
                "java",
                f"-Xmx{MEMORY}",
                "-cp",
                os.pathsep.join(map(str, classes)),
                "edu.anu.spice.SpiceScorer",
                *options,
            ],
            env={
                **os.environ,
                "JDK_JAVA_OPTIONS": f"{os.environ.get('JDK_JAVA_OPTIONS', '')} {opens}",
            },  # 8 ignores it
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not answered.exists():
            said = next(
                (
                    line
                    for line in done.stderr.splitlines()
                    if "Exception" in line or "Error" in line
                ),
                "",
            )
            raise WorkError(
                f"SPICE: Java ended with exit code {done.returncode}: "
                f"{said.strip() or 'it said nothing'}"
            )
        found = {
            row["image_id"]: float(row["scores"]["All"]["f"])
            for row in json.loads(answered.read_text())
        }
    return np.asarray([0.0 if math.isnan(found[i]) else found[i] for i in captions])
