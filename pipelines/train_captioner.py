"""The pipeline `train_captioner`: ingest, train and evaluate candidates, register the winner,
caption a folder.

preflight ─ ingest ─┬─ candidates ─ for each: train ─ evaluate ─┬─ register ─ caption a folder
                    └─ evaluate the champion ───────────────────┘   (and close, whatever happens)
"""

from functools import partial
from typing import Any

from kfp import dsl

from components import MODEL
from components.candidates.component import candidates
from components.close.component import close
from components.evaluate.component import evaluate
from components.evaluate_champion.component import evaluate_champion
from components.ingest.component import ingest
from components.preflight.component import preflight
from components.register.component import register
from components.train.component import train
from components.train_job.component import train_job
from model_lib.evaluate.config import EvaluateConfig
from model_lib.ingest.config import IngestConfig
from model_lib.registry.config import RegisterConfig
from model_lib.train.config import TrainConfig
from pipelines import placement
from pipelines.caption_bucket import NO_OPTIONS, add_caption_steps
from pipelines.placement import BUCKET, HUB, WEBHOOK, on_gpu, place, variables

CANDIDATES: list[dict[str, Any]] = [
    {"name": "five-captions"},
    {"name": "one-caption", "captions_per_image": 1},
]
"""By default: training on all captions of an image in each step, or on its first alone."""
TRAIN_SIZE: dict[str, Any] = {"cpu": 4, "memory": 24}
"""Cores and GiB of a machine that trains."""
MODEL_KEYS = (*BUCKET, *HUB)

DESCRIPTION = f"""\
Trains image captioners, evaluates them, registers the best in MLflow and captions a folder with
the champion.

| parameter | meaning |
|---|---|
| `data_dataset` | folder, file or URI, as `captioner ingest --dataset` takes it |
| `ingest_options` | further options of ingest; `annotations` or others, if no `data_dataset` |
| `data_output` | folder or URI for the Parquet shards |
| `data_shortest_side` | larger images are reduced to this many pixels on their shorter side |
| `train_candidates` | list of candidates: a name and the training options that differ |
| `train_checkpoint_uri` | folder or URI for checkpoints and models; a rerun resumes from it |
| `train_preset` | one of `captioner info`; `tiny` is trained from scratch |
| `train_vision`, `train_decoder`, `train_tokenizer` | other weights than the preset's |
| `train_epochs`, `train_batch_size`, `train_learning_rate` | 0: the preset's |
| `train_precision` | `auto`, `bfloat16`, `float16` or `float32`; empty: the preset's |
| `train_nodes` | machines that train one candidate together; several need Kubeflow Trainer |
| `train_cache_key` | any text; another one runs again what KFP's cache would skip |
| `eval_num_beams`, `eval_limit` | beams in decoding; first so many images only (0: all) |
| `eval_clip` | CLIP for CLIPScore, `openai/clip-vit-base-patch32` for one; empty: no CLIPScore |
| `register_metric`, `register_min_gain` | the deciding score, and the gain that it must show |
| `register_max_regression` | share of the champion's value by which another score may fall |
| `register_max_slowdown` | share by which captioning may be slower than the champion's |
| `caption_images`, `caption_output` | images to caption at the end, and where to; empty: none |
{placement.PARAMETERS}"""


def define(parallel: int) -> Any:
    """Return the pipeline; at most `parallel` candidates or shards are processed at a time."""

    @dsl.pipeline(name="train-captioner", description=DESCRIPTION)
    def train_captioner(
        data_output: str,
        train_checkpoint_uri: str,
        data_dataset: str = "",
        ingest_options: dict = NO_OPTIONS,
        data_shortest_side: int = IngestConfig.shortest_side,
        train_candidates: list[dict] = CANDIDATES,
        train_preset: str = TrainConfig.preset,
        train_vision: str = "",
        train_decoder: str = "",
        train_tokenizer: str = "",
        train_epochs: int = 0,
        train_batch_size: int = 0,
        train_learning_rate: float = 0.0,
        train_precision: str = "",
        train_nodes: int = 1,
        train_cache_key: str = "",
        eval_num_beams: int = EvaluateConfig.decode.num_beams,
        eval_limit: int = EvaluateConfig.limit,
        eval_clip: str = "",
        register_metric: str = RegisterConfig.metric,
        register_min_gain: float = RegisterConfig.min_gain,
        register_max_regression: float = RegisterConfig.max_regression,
        register_max_slowdown: float = RegisterConfig.max_slowdown,
        caption_images: str = "",
        caption_output: str = "",
        gpu_resource: str = placement.GPU_RESOURCE,
        gpu_count: str = "1",
        gpu_node_selector: dict = placement.GPU_NODES,
        gpu_tolerations: list = placement.GPU_TOLERATIONS,
        secret_name: str = placement.SECRET,
        secret_keys: list = placement.SECRET_KEYS,
    ) -> None:
        gpu = {
            "gpu_resource": gpu_resource,
            "gpu_count": gpu_count,
            "gpu_node_selector": gpu_node_selector,
            "gpu_tolerations": gpu_tolerations,
        }
        placed = partial(place, secret=secret_name)
        closed = close(run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER)
        placed(closed, "Close", keys=WEBHOOK)
        with dsl.ExitHandler(closed, name="Train a captioner"):
            training = {
                "candidates": train_candidates,
                "preset": train_preset,
                "vision": train_vision,
                "decoder": train_decoder,
                "tokenizer": train_tokenizer,
                "epochs": train_epochs,
                "batch_size": train_batch_size,
                "learning_rate": train_learning_rate,
                "precision": train_precision,
                "checkpoint_uri": train_checkpoint_uri,
            }
            policy = {
                "metric": register_metric,
                "min_gain": register_min_gain,
                "max_regression": register_max_regression,
                "max_slowdown": register_max_slowdown,
            }
            evaluation = {"num_beams": eval_num_beams, "limit": eval_limit, "clip": eval_clip}
            machines = {
                "nodes": train_nodes,
                "image": MODEL,
                **TRAIN_SIZE,
                **gpu,
                "secret_name": secret_name,
                "secret_variables": variables(MODEL_KEYS),
            }
            checked = preflight(
                run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
                secret_keys=secret_keys,
                dataset=data_dataset,
                shortest_side=data_shortest_side,
                ingest_options=ingest_options,
                data_output=data_output,
                **training,
                **policy,
                **evaluation,
                **machines,
                images=caption_images,
                caption_output=caption_output,
            )
            placed(checked, "Preflight", **placement.PREFLIGHT)

            # Not cached, as "Evaluate the champion": what lies at a URI, or which model is the
            # champion, is not among the inputs.
            ingested = ingest(
                dataset=data_dataset,
                output=data_output,
                shortest_side=data_shortest_side,
                options=ingest_options,
            ).after(checked)
            placed(ingested, "Ingest", keys=BUCKET, cpu=4, memory=8, hours=12)
            # By URI and fingerprint: an artifact would be a new input in each run, and nothing
            # would be cached.
            outputs = ingested.outputs
            data = {"data": outputs["manifest"], "fingerprint": outputs["fingerprint"]}

            evaluating: dict[str, Any] = {"keys": MODEL_KEYS, "cpu": 4, "memory": 16, "hours": 6}
            champion = evaluate_champion(**data, **evaluation, output=train_checkpoint_uri)
            on_gpu(placed(champion, "Evaluate the champion", **evaluating), **gpu)

            configured = candidates(**data, **training, cache_key=train_cache_key)
            placed(configured, "Candidates", keys=BUCKET)

            # Steps in a loop take only the item and the pipeline's parameters: kfp.local (2.17)
            # passes the item for any other output.
            with dsl.ParallelFor(
                configured.output, name="Each candidate", parallelism=parallel
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
                evaluated = evaluate(candidate=candidate, **evaluation).after(job, trained)
                on_gpu(placed(evaluated, "Evaluate", **evaluating, cached=True), **gpu)

            registered = register(
                run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
                evaluations=dsl.Collected(evaluated.outputs["Output"]),
                champion_evaluation=champion.output,
                **policy,
                images=caption_images,
            )
            placed(registered, "Register", keys=(*BUCKET, *WEBHOOK), memory=8)

            with dsl.If(caption_images != "", name="Images to caption"):
                add_caption_steps(
                    secret_name,
                    gpu,
                    parallel,
                    images=caption_images,
                    output=caption_output,
                    model=registered.outputs["Output"],
                )

    return train_captioner
