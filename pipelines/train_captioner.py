"""The pipeline `train_captioner`: ingest, train and evaluate candidates, register the winner,
caption a folder.

preflight ─ ingest ─┬─ for each candidate: train ─ evaluate ─┬─ register ─ caption a folder
                    └─ evaluate the champion ────────────────┘   (and close, whatever happens)
"""

from functools import partial
from typing import Any

from kfp import dsl

from components import MODEL
from components.close.component import close
from components.evaluate.component import evaluate
from components.evaluate_champion.component import evaluate_champion
from components.ingest.component import ingest
from components.ingest_help.component import ingest_help
from components.preflight.component import preflight
from components.register.component import register
from components.train.component import train
from components.train_job.component import train_job
from model_lib.train.config import TrainConfig
from pipelines import placement
from pipelines.caption_bucket import NO_OPTIONS, add_caption_workers
from pipelines.placement import BUCKET, HUB, WEBHOOK, on_gpu, place, variables

CANDIDATES: list[dict[str, Any]] = [
    {"name": "five-captions"},
    {"name": "one-caption", "captions_per_image": 1},
]
"""By default: training on all captions of an image in each step, or on its first alone."""
TRAIN_SIZE: dict[str, Any] = {"cpu": 4, "memory": 24}
"""Cores and GiB of a machine that trains."""
MODEL_KEYS = (*BUCKET, *HUB)
DESCRIPTION = """\
Trains image captioners, evaluates them, registers the best in MLflow and captions a folder with the
champion."""


def define(parallel: int) -> Any:
    """Return the pipeline; at most `parallel` candidates are trained at a time."""

    @dsl.pipeline(name="train-captioner", description=DESCRIPTION)
    def train_captioner(
        output: str,
        data: str = "",
        preset: str = TrainConfig.preset,
        candidates: list[dict] = CANDIDATES,
        ingest_options: dict = NO_OPTIONS,
        ingest_workers: int = 1,
        train_options: dict = NO_OPTIONS,
        train_nodes: int = 1,
        eval_options: dict = NO_OPTIONS,
        register_options: dict = NO_OPTIONS,
        caption_images: str = "",
        caption_options: dict = NO_OPTIONS,
        caption_workers: int = 4,
        gpu_resource: str = placement.GPU_RESOURCE,
        gpu_count: str = "1",
        gpu_node_selector: dict = placement.GPU_NODES,
        gpu_tolerations: list = placement.GPU_TOLERATIONS,
        secret_name: str = placement.SECRET,
    ) -> None:
        """Train a captioner.

        Args:
            output: Folder or URI for data, checkpoints, models and captions; a rerun resumes.
            data: Images and captions: folder, file or URI, as captioner ingest --dataset takes it.
            preset: One of captioner info; tiny is trained from scratch.
            candidates: List of candidates, each a name and the training options that differ.
            ingest_options: Further options of captioner ingest; without data, its annotations, or
                train and val.
            ingest_workers: Machines that ingest at the same time, from 1 to 64.
            train_options: Further options of captioner train, of all candidates.
            train_nodes: Machines that train one candidate; several need Kubeflow Trainer.
            eval_options: Further options of captioner evaluate, for example {"num_beams": 5}.
            register_options: Further options of captioner register, for example {"min_gain": 0.01}.
            caption_images: Folder, archive or list to caption at the end; empty for none.
            caption_options: Further options of captioner batch.
            caption_workers: GPUs that caption at the same time, from 1 to 64.
            gpu_resource: What a step on a GPU asks of its node.
            gpu_count: GPUs of each step that uses them; 0 for none.
            gpu_node_selector: Labels of the GPU nodes; by default, GKE's spot nodes with an L4.
            gpu_tolerations: Of the GPU nodes' taints.
            secret_name: Kubernetes secret with the steps' environment; must not be empty.
        """
        gpu = {
            "gpu_resource": gpu_resource,
            "gpu_count": gpu_count,
            "gpu_node_selector": gpu_node_selector,
            "gpu_tolerations": gpu_tolerations,
        }
        machines = {
            "nodes": train_nodes,
            "image": MODEL,
            **TRAIN_SIZE,
            **gpu,
            "secret_name": secret_name,
            "secret_variables": variables(MODEL_KEYS),
        }
        captioning = {
            "output": output,
            "images": caption_images,
            "caption_options": caption_options,
            "caption_workers": caption_workers,
        }
        training = {"preset": preset, "candidates": candidates, "train_options": train_options}
        run_name = dsl.PIPELINE_JOB_NAME_PLACEHOLDER
        placed = partial(place, secret=secret_name)
        closed = close(run_name=run_name)
        placed(closed, "Close", keys=WEBHOOK)
        with dsl.ExitHandler(closed, name="Train a captioner"):
            checked = preflight(
                run_name=run_name,
                data=data,
                ingest_options=ingest_options,
                ingest_workers=ingest_workers,
                eval_options=eval_options,
                register_options=register_options,
                **training,
                **captioning,
                **machines,
            )
            placed(checked, "Preflight", **placement.PREFLIGHT)

            # Not cached, as "Evaluate the champion": what lies at a URI, or which model is the
            # champion, is not among the inputs.
            ingesting = {"data": data, "output": output, "options": ingest_options}
            many: dict[str, Any] = {"cpu": 4, "memory": 8, "hours": 12}
            ingested = ingest(**ingesting, workers=ingest_workers, **training).after(checked)
            placed(ingested, "Ingest", keys=MODEL_KEYS, **many)
            # Beside it: Ingest writes what these have not.
            with (
                dsl.If(ingest_workers > 1, name="Several to ingest"),
                dsl.ParallelFor(checked.output, name="Each helper") as worker,
            ):
                helped = ingest_help(worker=worker, workers=ingest_workers, **ingesting)
                placed(helped, "Help to ingest", keys=BUCKET, **many)
            # By URI and fingerprint: an artifact would be a new input in each run, and nothing
            # would be cached.
            ingested_data = {name: ingested.outputs[name] for name in ("manifest", "fingerprint")}

            evaluating: dict[str, Any] = {"keys": MODEL_KEYS, "cpu": 4, "memory": 16, "hours": 6}
            champion = evaluate_champion(**ingested_data, options=eval_options, output=output)
            on_gpu(placed(champion, "Evaluate the champion", **evaluating), **gpu)

            # In kfp.local (2.17), a loop beside a step runs over the step's Output alone, and the
            # steps in it take only the item and the pipeline's parameters.
            with dsl.ParallelFor(
                ingested.outputs["Output"], name="Each candidate", parallelism=parallel
            ) as candidate:
                # Each retry resumes from the last checkpoint.
                long: dict[str, Any] = {"keys": MODEL_KEYS, "hours": 72, "retries": 6}
                with dsl.If(train_nodes > 1, name="On several machines"):
                    job = train_job(candidate=candidate, **machines)
                    placed(job, "Train", **long, cached=True)
                with dsl.Else(name="On one"):
                    trained = train(candidate=candidate)
                    on_gpu(placed(trained, "Train", **TRAIN_SIZE, **long, cached=True), **gpu)
                # It finds the model by the candidate: OneOf fails over a step from the cache.
                evaluated = evaluate(candidate=candidate, options=eval_options).after(job, trained)
                on_gpu(placed(evaluated, "Evaluate", **evaluating, cached=True), **gpu)

            registered = register(
                run_name=run_name,
                evaluations=dsl.Collected(evaluated.outputs["Output"]),
                champion_evaluation=champion.output,
                options=register_options,
                **captioning,
            )
            placed(registered, "Register", keys=(*BUCKET, *WEBHOOK), memory=8, hours=4)

            with dsl.If(caption_images != "", name="Images to caption"):
                outputs = registered.outputs
                add_caption_workers(outputs["workers"], outputs["plan"], output, secret_name, gpu)

    return train_captioner
