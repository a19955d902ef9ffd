"""`captioner run`: the whole training pipeline on this machine, through `kfp.local`.

The working directory gets everything: generated scenes, shards, checkpoints, MLflow's store,
captions, and `pipeline.log` with all that the steps printed. The terminal shows each step and its
progress, and a summary at the end.
"""

import contextlib
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from model_lib.batch.config import BatchConfig
from model_lib.batch.listing import list_images
from model_lib.cli import Output
from model_lib.errors import UserError
from model_lib.ingest.config import ScenesConfig
from model_lib.ingest.datasets import coco_2017, is_coco_2017, require_sources
from model_lib.io import storage
from model_lib.io.cpus import cpu_count
from model_lib.io.locks import output_lock
from model_lib.options import StageConfig, option, require
from model_lib.steps.form import candidate_configs, ingest_config
from model_lib.tracking.server import require_mlflow, tracking_from_environment
from model_lib.train.config import TrainConfig, resolve
from pipelines.forking import forked_steps
from pipelines.local import REACHED, run_locally, say
from pipelines.summary import read_summary, summary_lines

MODELS = ("vision", "decoder", "tokenizer", "init_from")
"""Training options that name models."""
LISTS = ("annotations", "train", "karpathy")
"""Ingest options that name data, instead of a data set."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(StageConfig):
    """Run the whole training pipeline on this machine; without data, on generated scenes."""

    dataset: str | None = None
    """Folder, file or URI with images and captions, as captioner ingest --dataset takes it."""
    ingest_options: str | None = None
    """JSON of further options of captioner ingest, and instead of --dataset of its lists:
    '{"annotations": "captions.csv", "images": "photos"}'."""
    preset: str = "tiny"
    """Model size: tiny (from scratch, minutes on a CPU), or clip-l-gpt2-medium."""
    runner: Literal["subprocess", "docker"] = "subprocess"
    """Steps as processes of this Python, or each in its container image."""
    workdir: str = "runs"
    """Folder for all outputs."""
    vision: str | None = None
    """Hub name, folder or URI of another CLIP or SigLIP than the preset's."""
    decoder: str | None = None
    """Hub name, folder or URI of another GPT-2 than the preset's."""
    tokenizer: str | None = None
    """Hub name, folder or URI of the tokenizer; by default the decoder's own."""
    candidates: str | None = None
    """JSON list of candidates, each a name and the training options in which it differs; by default
    the pipeline's."""
    epochs: int | None = option(None, minimum=1)
    """Passes over the training images; by default the preset's."""
    images: str | None = None
    """Images that the champion captions at the end; by default COCO's validation images, or those
    of the data set."""
    scenes: int = option(ScenesConfig.train, minimum=1)
    """Training images to generate when there is no --dataset."""
    num_beams: int = option(5, minimum=1)
    """Beams in evaluating the candidates; 1: greedy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_local = storage.is_local(self.workdir)
        require(is_local, f"workdir {self.workdir}: is not a folder of this machine")


def run(config: RunConfig) -> Output:
    """Run `train_captioner` with everything under the working directory."""
    from pipelines.train_captioner import CANDIDATES

    started = time.monotonic()
    work = Path(config.workdir).absolute()
    candidates = CANDIDATES if config.candidates is None else _json("candidates", config.candidates)
    names = ("vision", "decoder", "tokenizer", "epochs")
    options = {name: value for name in names if (value := getattr(config, name)) is not None}
    options = _absolute(options)
    configs = candidate_configs(candidates, config.preset, options)  # raises now
    parallel = 1
    if are_small(configs):
        # Several threads wait for each other's small products; candidates need not.
        parallel = min(len(configs), cpu_count())
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    training = {
        "preset": config.preset,
        "candidates": [_absolute(candidate) for candidate in candidates],
        "train_options": options,
    }
    with output_lock(str(work)):
        summary = _run(config, training, work, parallel)
    summary["seconds"] = round(time.monotonic() - started, 1)
    return Output(summary, summary_lines(summary))


def _run(config: RunConfig, training: dict[str, Any], work: Path, parallel: int) -> dict[str, Any]:
    """Run the pipeline in a locked working directory; return the summary."""
    from pipelines.train_captioner import define

    steps = forked_steps() if config.runner == "subprocess" else contextlib.nullcontext()
    tracking = require_mlflow(tracking_from_environment(str(work)))
    tracking.require_answer()
    dataset, ingest_options = data_of(config, work)
    beside_list = ingest_options.get("annotations", "").rpartition("/")[0]
    images = config.images or ingest_options.get("images") or images_of(dataset or beside_list)
    arguments = {
        "data": dataset,
        "ingest_options": ingest_options,
        "output": str(work),
        **training,
        "eval_options": {"num_beams": config.num_beams},
        "caption_images": images and storage.absolute(images),
        "caption_workers": 1,
    }
    os.environ.update(MLFLOW_EXPERIMENT_ID=tracking.experiment_id, KFP_RUN_ID=str(uuid.uuid4()))
    os.environ.pop("MLFLOW_RUN_ID", None)
    try:
        is_demo = config == replace(RunConfig(), workdir=config.workdir)
        reached = REACHED if is_demo else None
        with steps:
            root = run_locally(define(parallel), arguments, work, config.runner, reached)
    except KeyboardInterrupt:  # the exit handler has not run
        require_mlflow(tracking_from_environment(str(work))).close_pipeline(succeeded=False)
        raise
    summary = read_summary(root, tracking.uri, bool(images))
    if summary["registered"]["promoted"]:
        _link_best(work, summary["model"])
    return summary


def are_small(candidates: Sequence[TrainConfig]) -> bool:
    """Return whether all candidates are trained from scratch, which only small models are."""
    return all(resolve(c).vision is None and c.init_from is None for c in candidates)


def _link_best(work: Path, model: str) -> None:
    """Link `best` in the working directory to the model that became champion."""
    link, new = work / "best", work / ".best"
    if link.is_symlink() or not link.exists():  # a folder of that name is the user's
        new.unlink(missing_ok=True)
        new.symlink_to(model)
        new.replace(link)


def data_of(config: RunConfig, work: Path) -> tuple[str, dict[str, Any]]:
    """Return the data set's path or URI, "" if there are lists, and ingest's further options;
    without data, draw scenes."""
    options = _json("ingest_options", config.ingest_options or "{}")
    require(isinstance(options, dict), "ingest_options: is not a JSON object")
    dataset = config.dataset or ""
    has_data = dataset or any(name in options for name in LISTS)
    ingest = ingest_config(dataset if has_data else "scenes", str(work), options)  # raises now
    if has_data:
        require_sources(ingest)
    else:
        dataset = _draw_scenes(config, work)
    for name in (*LISTS, "val", "images"):
        if name in options:
            options[name] = storage.absolute(options[name])
    return dataset and storage.absolute(dataset), options


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: is not JSON: {error}") from error


def _draw_scenes(config: RunConfig, work: Path) -> str:
    """Draw scenes, and return their folder."""
    from model_lib.ingest.scenes import make_scenes

    val = min(ScenesConfig.val, config.scenes)
    scenes = ScenesConfig(output=str(work / "scenes"), train=config.scenes, val=val)
    say(f"drawing {scenes.train:,} scenes to train on and {val} of unseen combinations")
    make_scenes(scenes)
    return scenes.output


def images_of(dataset: str) -> str:
    """Return the images of a data set that are captioned at the end; "" if it has no files of
    images."""
    if not dataset:
        return ""
    if is_coco_2017(dataset):
        return coco_2017(dataset, "val")[1].root
    try:
        next(list_images(BatchConfig(images=dataset, output="-", model="-"), Counter()))
    except UserError:
        return ""
    return dataset


def _absolute(options: dict[str, Any]) -> dict[str, Any]:
    """Return training options in which models in local folders have absolute paths, for
    containers."""
    folders = [name for name in MODELS if options.get(name) and Path(options[name]).is_dir()]
    return {**options, **{name: storage.absolute(options[name]) for name in folders}}
