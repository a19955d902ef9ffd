"""`captioner compile`: the pipelines as the YAML that a Kubeflow Pipelines server takes."""

import ast
import contextlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from model_lib.cli import Output
from model_lib.io import storage
from model_lib.options import StageConfig

PARALLEL = 4
"""Candidates that are trained at the same time on a cluster."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig(StageConfig):
    """Compile the pipelines to the YAML that a Kubeflow Pipelines server takes."""

    output: str = str(Path(__file__).parent / "compiled")
    """Folder for the YAML files."""


_STRUCTURED_DEFAULT = re.compile(r"^(#    \w+: \w+ \[Default: )([\[{].*[\]}])\]$", re.MULTILINE)


def _sorted_default(line: re.Match[str]) -> str:
    """Return the header's line with sorted keys: protobuf, from which kfp prints it, orders them by
    chance."""
    return f"{line[1]}{json.dumps(ast.literal_eval(line[2]), sort_keys=True)}]"


def compile_all(config: CompileConfig) -> Output:
    """Write each pipeline's YAML; the same code writes the same bytes."""
    from kfp import compiler

    from pipelines import train_captioner
    from pipelines.caption_bucket import caption_bucket

    folder = Path(config.output)
    storage.require_writable(str(folder))
    written = []
    for pipeline in (train_captioner.define(PARALLEL), caption_bucket):
        target = folder / f"{pipeline.name.replace('-', '_')}.yaml"
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            compiler.Compiler().compile(pipeline, str(target))
        target.write_text(re.sub(_STRUCTURED_DEFAULT, _sorted_default, target.read_text()))
        written.append(str(target))
    return Output(written, written)
