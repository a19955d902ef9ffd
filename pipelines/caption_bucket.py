"""The pipeline `caption_bucket`: list a bucket's images, caption them in parallel, count them.

preflight ─ plan ─ for each shard: caption ─ merge        (and close, whatever happens)
"""

from typing import Any

from kfp import dsl

from components.caption.component import caption
from components.close.component import close
from components.merge.component import merge
from components.plan.component import plan
from components.preflight.component import preflight
from model_lib.batch.config import BatchConfig
from model_lib.registry.model_uris import CHAMPION_URI
from pipelines import placement
from pipelines.placement import BUCKET, HUB, WEBHOOK, on_gpu, place

NO_OPTIONS: dict[str, Any] = {}

DESCRIPTION = f"""\
Captions the images under a bucket's prefix into Parquet: one row for each image, with a status.
Started again it captions what is missing, new or changed.

| parameter | meaning |
|---|---|
| `caption_images` | folder, URI or archive of the images, or a list of them |
| `caption_output` | folder or URI for the Parquet files, the plan and the summary |
| `caption_model` | folder, URI, hub name or `models:/…`; an alias is pinned to its version |
| `caption_num_beams` | beams in decoding; 1: greedy |
| `caption_shard_images` | images a shard; each shard is a step on a GPU |
| `caption_options` | further options of `captioner batch`: `{{{{"format": "csv"}}}}` |
{placement.PARAMETERS}"""


def add_caption_steps(
    secret: Any,
    gpu: dict[str, Any],
    parallel: int,
    num_beams: Any = BatchConfig.decode.num_beams,
    shard_images: Any = BatchConfig.shard_images,
    options: Any = NO_OPTIONS,
    **uris: Any,
) -> dsl.PipelineTask:
    """Add the steps that caption images to a pipeline; return the first.

    Args:
        secret: name of the Kubernetes secret.
        gpu: see `on_gpu`.
        parallel: shards that are captioned at a time.
        num_beams, shard_images, options: see the pipeline's parameters.
        uris: images, output and model.
    """
    planned = plan(num_beams=num_beams, shard_images=shard_images, options=options, **uris)
    place(planned, "Plan", secret=secret, keys=BUCKET, memory=4)
    with dsl.ParallelFor(planned.output, name="Shards", parallelism=parallel) as shard:
        captioned = caption(shard=shard)
        size: dict[str, Any] = {"cpu": 4, "memory": 16, "hours": 12, "retries": 4}
        place(captioned, "Caption", secret=secret, keys=(*BUCKET, *HUB), **size)
        on_gpu(captioned, **gpu)
    plans = dsl.Collected(captioned.output)
    merged = merge(run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER, plans=plans)
    place(merged, "Merge", secret=secret, keys=(*BUCKET, *WEBHOOK), memory=4)
    return planned


def define(parallel: int) -> Any:
    """Return the pipeline; at most `parallel` shards are captioned at a time."""

    @dsl.pipeline(name="caption-bucket", description=DESCRIPTION)
    def caption_bucket(
        caption_images: str,
        caption_output: str,
        caption_model: str = CHAMPION_URI,
        caption_num_beams: int = BatchConfig.decode.num_beams,
        caption_shard_images: int = BatchConfig.shard_images,
        caption_options: dict = NO_OPTIONS,
        gpu_resource: str = placement.GPU_RESOURCE,
        gpu_count: str = "1",
        gpu_node_selector: dict = placement.GPU_NODES,
        gpu_tolerations: list = placement.GPU_TOLERATIONS,
        secret_name: str = placement.SECRET,
        secret_keys: list = placement.SECRET_KEYS,
    ) -> None:
        closed = close(run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER)
        place(closed, "Close", secret=secret_name, keys=WEBHOOK)
        with dsl.ExitHandler(closed, name="Caption a bucket"):
            checked = preflight(
                run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
                secret_name=secret_name,
                secret_keys=secret_keys,
                candidates=[],
                images=caption_images,
                model=caption_model,
                caption_output=caption_output,
            )
            place(checked, "Preflight", secret=secret_name, **placement.PREFLIGHT)
            gpu = {
                "gpu_resource": gpu_resource,
                "gpu_count": gpu_count,
                "gpu_node_selector": gpu_node_selector,
                "gpu_tolerations": gpu_tolerations,
            }
            first = add_caption_steps(
                secret_name,
                gpu,
                parallel,
                caption_num_beams,
                caption_shard_images,
                caption_options,
                images=caption_images,
                output=caption_output,
                model=caption_model,
            )
            first.after(checked)

    return caption_bucket
