"""SPICE, by pycocoevalcap's jar and the models of Stanford CoreNLP 3.6.0, which `captioner download
spice` fetches.

Anderson et al. 2016, "SPICE: Semantic Propositional Image Caption Evaluation".
"""

import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from model_lib.errors import UserError, WorkError
from model_lib.io import storage
from model_lib.scores.java import run_java

MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
MEMORY = "8G"
OPENED = ("java.lang", "java.math", "java.net", "java.text", "java.util", "java.util.concurrent")
"""Packages in which SPICE's serialisation looks at private fields, which Java forbids since its
version 16."""


def unpack_models(archive: str, output: str) -> None:
    """Extract SPICE's models, which Java wants as files, from CoreNLP's archive.

    Args:
        archive: path or URI of the zip archive.
        output: folder or URI for `MODELS`.

    Raises:
        WorkError: they are not in the archive.
    """
    with storage.open_file(archive) as file, zipfile.ZipFile(file) as zipped:
        members = {Path(name).name: name for name in zipped.namelist()}
        for name in MODELS:
            if name not in members:
                raise WorkError(f"{archive}: has no {name} in it; use another --base")
            with (
                zipped.open(members[name]) as member,
                storage.atomic_file(storage.join(output, name)) as part,
                Path(part).open("wb") as model,
            ):
                shutil.copyfileobj(member, model)


def require_spice(folder: str) -> None:
    """Raise `UserError` unless `folder` has SPICE's models and there is Java."""
    if shutil.which("java") is None:
        raise UserError("SPICE needs Java (apt-get install default-jre-headless)")
    for name in MODELS:
        if not Path(folder, name).is_file():
            remedy = f"captioner download spice --output {folder}"
            raise UserError(f"spice {folder}: has no {name}; fetch it: {remedy}")


def spice_scores(
    captions: Mapping[int, str], references: Mapping[int, Sequence[str]], folder: str
) -> np.ndarray:
    """Return the SPICE of each image's caption, float64 [images]; 0 where it has nothing to
    compare. `WorkError` if the program fails.

    Args:
        captions: by image id.
        references: by image id, at least those of `captions`.
        folder: with `MODELS`.
    """
    from pycocoevalcap.spice import spice

    home = Path(spice.__file__).parent
    models = [Path(folder, name) for name in MODELS]
    classes = [home / spice.SPICE_JAR, *sorted((home / "lib").glob("*.jar")), *models]
    rows = [
        {"image_id": i, "test": text, "refs": list(references[i])} for i, text in captions.items()
    ]
    opens = " ".join(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED)
    java_options = f"{os.environ.get('JDK_JAVA_OPTIONS', '')} {opens}"  # Java 8 ignores it
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "captions.json"), Path(scratch, "scores.json")
        inputs.write_text(json.dumps(rows))
        command = [f"-Xmx{MEMORY}", "-cp", os.pathsep.join(map(str, classes))]
        command += ["edu.anu.spice.SpiceScorer", str(inputs), "-cache", f"{scratch}/cache"]
        command += ["-out", str(outputs), "-subset", "-silent"]
        environment = {**os.environ, "JDK_JAVA_OPTIONS": java_options}
        run_java(command, f"{MEMORY}B", environment=environment)
        if not outputs.exists():
            raise WorkError("Java ended without a message, and without scores")
        document = json.loads(outputs.read_text())
    scores = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in document}
    return np.asarray([0.0 if math.isnan(scores[i]) else scores[i] for i in captions])
