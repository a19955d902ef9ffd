"""`captioner run`: the whole training pipeline on this machine, through `kfp.local`.

Everything it makes lies in the working directory: generated scenes, shards, checkpoints, MLflow's store, captions, and
`pipeline.log` with all that the steps printed. The terminal shows each step and its progress, and a summary at the end.
"""

import contextlib
import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from components import IMAGE
from model_lib import storage
from model_lib.cli import Output
from model_lib.config import ScenesConfig, StageConfig, TrainConfig, option
from model_lib.errors import UserError, WorkError
from model_lib.tracking import require_mlflow, tracking_from_environment
from pipelines.summary import read_summary, summary_lines
from pipelines.train_captioner import CANDIDATES, define


@dataclass(frozen=True, kw_only=True)
class RunConfig(StageConfig):
    """Run the whole training pipeline on this machine; without --dataset, on generated scenes."""

    dataset: str | None = None
    """Folder in COCO 2017's layout: annotations/captions_{train,val}2017.json, train2017/, val2017/."""
    preset: str = "tiny"
    """Model size: tiny (from scratch, minutes on a CPU), or clip-l-gpt2-medium."""
    runner: Literal["subprocess", "docker"] = "subprocess"
    """Steps as processes of this Python, or each in its container image."""
    workdir: str = "runs"
    """Folder for everything that is made."""
    vision: str | None = None
    """Hub name, folder or URI of another CLIP vision tower than the preset's."""
    decoder: str | None = None
    """Hub name, folder or URI of another GPT-2 than the preset's."""
    tokenizer: str | None = None
    """Hub name, folder or URI of the tokenizer; by default the decoder's own."""
    candidates: str | None = None
    """JSON list of candidates, each a name and the training options in which it differs; by default the pipeline's."""
    epochs: int = option(0, minimum=0)
    """Passes over the training pictures; 0: the preset's."""
    images: str | None = None
    """Pictures that the champion captions at the end; by default the data set's validation pictures."""
    scenes: int = option(ScenesConfig.train, minimum=1)
    """Training pictures to generate when there is no --dataset."""
    num_beams: int = option(5, minimum=1)
    """Beams in judging the candidates; 1: greedy."""


def run(config: RunConfig) -> Output:
    """Run `train_captioner` with everything under the working directory."""
    started = time.monotonic()
    work = Path(config.workdir).absolute()
    candidates = _candidates(config)
    storage.require_writable(str(work))
    dataset = _dataset(config, work)
    arguments = {
        "data_dataset": dataset,
        "data_output": str(work / "data"),
        "train_checkpoint_uri": str(work / "candidates"),
        "train_candidates": candidates,
        **{f"train_{name}": value or "" for name, value in _common(config).items() if name != "epochs"},
        "train_epochs": config.epochs,
        "eval_num_beams": config.num_beams,
        "caption_images": storage.absolute(config.images) if config.images else storage.join(dataset, "val2017"),
        "caption_output": str(work / "captions"),
    }
    tracking = require_mlflow(tracking_from_environment(str(work)))
    run_name = f"train_captioner {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with tracking.start(run_name, None, params=arguments, tags={}) as parent:
        os.environ["MLFLOW_EXPERIMENT_ID"] = tracking.experiment_id
        os.environ["MLFLOW_RUN_ID"] = str(parent.run_id)
        root = _run_pipeline(config, arguments, work)
    summary = read_summary(root, tracking.uri)
    if summary["registered"]["promoted"]:
        _link_best(work, summary["model"])
    summary["seconds"] = round(time.monotonic() - started, 1)
    return Output(summary, summary_lines(summary))


def _link_best(work: Path, model: str) -> None:
    """Let `best` in the working directory lead to the model that became champion."""
    link, fresh = work / "best", work / ".best"
    if link.is_symlink() or not link.exists():  # a folder of that name is somebody's own
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(model)
        fresh.replace(link)


def _dataset(config: RunConfig, work: Path) -> str:
    """Return the data set's place; without one, draw scenes."""
    if config.dataset is not None:
        annotations = storage.join(config.dataset, "annotations", "captions_train2017.json")
        if not storage.exists(annotations):
            raise UserError(f"{annotations}: not found; --dataset expects COCO's layout, with train2017/ and val2017/")
        return storage.absolute(config.dataset)
    from model_lib.scenes import make_scenes

    scenes = ScenesConfig(output=str(work / "scenes"), train=config.scenes, val=min(ScenesConfig.val, config.scenes))
    _say(f"drawing {scenes.train:,} scenes to learn from and {scenes.val} of unseen combinations")
    make_scenes(scenes)
    return scenes.output


def _common(config: RunConfig) -> dict[str, Any]:
    """Return the training options of all candidates."""
    return {name: getattr(config, name) for name in ("preset", "vision", "decoder", "tokenizer", "epochs")}


def _candidates(config: RunConfig) -> list[dict[str, Any]]:
    """Return the candidates, their options checked before anything is started."""
    candidates = CANDIDATES
    if config.candidates is not None:
        try:
            candidates = json.loads(config.candidates)
        except json.JSONDecodeError as error:
            raise UserError(f"candidates: is not JSON: {error}") from error
    if not isinstance(candidates, list) or not candidates or not all(isinstance(c, dict) for c in candidates):
        raise UserError('candidates: expected a JSON list of objects, [{"name": "a", "learning_rate": 1e-3}]')
    names = [TrainConfig.from_options(**{**_common(config), **c, "data": "-", "output": "-"}).name for c in candidates]
    if len(set(names)) < len(names):
        raise UserError(f"candidates: each needs a name of its own, not {', '.join(names)}")
    return candidates


def _run_pipeline(config: RunConfig, arguments: dict[str, Any], work: Path) -> Path:
    """Run the pipeline through kfp.local; return the folder in which it left each step's outputs.

    Raises:
        UserError: a step refused its input; the message is the step's.
        WorkError: a step failed; the log says how.
    """
    from kfp import local

    root, log_file = work / "pipeline", work / "pipeline.log"
    runner = (
        local.SubprocessRunner(use_venv=False) if config.runner == "subprocess" else _docker_runner(arguments, work)
    )
    with warnings.catch_warnings(), log_file.open("w") as log, _followed(log):
        warnings.simplefilter("ignore")
        local.init(runner, pipeline_root=str(root), raise_on_error=True)
        before = set(root.glob("*"))
        try:
            define(parallel_candidates=1)(**arguments)  # two would only share the one machine
        except Exception as error:
            refused = re.findall(r"^\s*model_lib\.errors\.UserError: (.*)$", log_file.read_text(), re.MULTILINE)
            if refused:
                raise UserError(refused[-1]) from error
            raise WorkError(f"the pipeline stopped ({error}); {log_file} has all that its steps printed") from error
    (made,) = set(root.glob("*")) - before
    return made


def _docker_runner(arguments: dict[str, Any], work: Path) -> Any:
    """Return the runner that starts each step in the image, as the present user.

    The working directory and the inputs are mounted in their own places, so that paths mean the same inside.
    """
    import docker
    from kfp import local

    try:
        client = docker.from_env()
        client.images.get(IMAGE)
    except docker.errors.ImageNotFound as error:
        raise UserError(f"runner docker: image {IMAGE} is not on this machine; build it with make image") from error
    except docker.errors.DockerException as error:
        raise UserError(f"runner docker: no Docker engine answers: {error}") from error
    inputs = {arguments[name] for name in ("data_dataset", "caption_images") if storage.is_local(arguments[name])}
    outside = {place for place in inputs if not Path(place).is_relative_to(work)}
    mounts = [docker.types.Mount(place, place, type="bind", read_only=True) for place in sorted(outside)]
    mounts.append(docker.types.Mount(str(work), str(work), type="bind"))
    passed = {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "HF_"))}
    return local.DockerRunner(
        mounts=mounts,
        environment=passed,
        network_mode="host",  # a tracking server on this machine is at the same address inside
        user=f"{os.getuid()}:{os.getgid()}",
        shm_size="1g",
    )


@contextlib.contextmanager
def _followed(log: TextIO) -> Iterator[None]:
    """Send all that the pipeline prints to `log`, and show its steps and their progress as it goes."""
    terminal = sys.stdout
    with contextlib.redirect_stdout(_Follower(log)):
        try:
            yield
        finally:
            terminal.flush()


class _Follower(io.TextIOBase):
    """Writes everything to a log, and says on stderr what a person wants to see."""

    def __init__(self, log: TextIO) -> None:
        self.log, self.line = log, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.log.write(text)
        self.log.flush()
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self._show(re.sub(r"\x1b\[[0-9;]*m", "", line).strip())
        return len(text)

    def _show(self, line: str) -> None:
        step = re.search(r"Executing task '([\w-]+)'", line)
        if step:
            _say(f"step {step[1]}")
        elif re.match(r"(ingest|train [\w.-]+|evaluate on \w+|caption): [\d,]+/", line) or line.startswith(
            "captioner:"
        ):
            _say(f"  {line.removeprefix('captioner: ')}")


def _say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)
