"""The pipeline `caption_bucket`: list a bucket's images, caption them in parallel, count them.

preflight ─ plan ─ for each worker: caption ─ merge        (and close, whatever happens)
"""

from typing import Any

from kfp import dsl

from components.caption.component import caption
from components.close.component import close
from components.merge.component import merge
from components.plan.component import plan
from components.preflight.component import preflight
from model_lib.registry.model_uris import CHAMPION_URI
from pipelines import placement
from pipelines.placement import BUCKET, HUB, WEBHOOK, on_gpu, place

NO_OPTIONS: dict[str, Any] = {}

WORKERS = 8
"""Unless the run says otherwise: with 12 nodes each, Argo's workflow stays under 1 MiB, above which
the list of tasks in the UI freezes (see docs/scale.md)."""
DESCRIPTION = """\
Captions the images of a bucket, archive or list into Parquet: one row for each image, with a
status. Started again, it captions what is missing, new or changed."""


def add_caption_workers(
    parts: Any, planned: Any, output: Any, secret: Any, gpu: dict[str, Any]
) -> None:
    """Add the steps that caption a plan's images to a pipeline.

    Args:
        parts: what each worker must know.
        planned: the plan's place below `output`.
        output: folder or URI in which the plan is.
        secret: name of the Kubernetes secret.
        gpu: see `on_gpu`.
    """
    with dsl.ParallelFor(parts, name="Each worker") as part:
        captioned = caption(part=part, output=output)
        size: dict[str, Any] = {"cpu": 4, "memory": 16, "hours": 72, "retries": 4}
        place(captioned, "Caption images", secret=secret, keys=(*BUCKET, *HUB), **size)
        on_gpu(captioned, **gpu)
    merged = merge(
        run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
        output=output,
        plan=planned,
        shards=dsl.Collected(captioned.output),
    )
    place(merged, "Merge", secret=secret, keys=(*BUCKET, *WEBHOOK), memory=4)


@dsl.pipeline(name="caption-bucket", description=DESCRIPTION)
def caption_bucket(
    images: str,
    output: str,
    model: str = CHAMPION_URI,
    caption_options: dict = NO_OPTIONS,
    caption_workers: int = WORKERS,
    gpu_resource: str = placement.GPU_RESOURCE,
    gpu_count: str = "1",
    gpu_node_selector: dict = placement.GPU_NODES,
    gpu_tolerations: list = placement.GPU_TOLERATIONS,
    secret_name: str = placement.SECRET,
) -> None:
    """Caption images.

    Args:
        images: Folder, archive or list of the images, or its URI.
        output: Folder or URI for the Parquet files, the plan and the summary.
        model: Folder, URI, hub name or models:/…; an alias is pinned to its version.
        caption_options: Further options of captioner batch, for example {"num_beams": 5}.
        caption_workers: GPUs that caption at the same time, from 1 to 64.
        gpu_resource: What a step on a GPU asks of its node.
        gpu_count: GPUs of each step that uses them; 0 for none.
        gpu_node_selector: Labels of the GPU nodes; by default, GKE's spot nodes with an L4.
        gpu_tolerations: Of the GPU nodes' taints.
        secret_name: Kubernetes secret with the steps' environment; must not be empty.
    """
    closed = close(run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER)
    place(closed, "Close", secret=secret_name, keys=WEBHOOK)
    with dsl.ExitHandler(closed, name="Caption a bucket"):
        checked = preflight(
            run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
            output=output,
            images=images,
            model=model,
            caption_options=caption_options,
            caption_workers=caption_workers,
            secret_name=secret_name,
        )
        place(checked, "Preflight", secret=secret_name, **placement.PREFLIGHT)
        planned = plan(
            images=images,
            output=output,
            model=model,
            options=caption_options,
            workers=caption_workers,
        ).after(checked)
        place(planned, "Plan", secret=secret_name, keys=BUCKET, memory=4, hours=4)
        gpu = {
            "gpu_resource": gpu_resource,
            "gpu_count": gpu_count,
            "gpu_node_selector": gpu_node_selector,
            "gpu_tolerations": gpu_tolerations,
        }
        outputs = planned.outputs
        add_caption_workers(outputs["Output"], outputs["plan"], output, secret_name, gpu)
