"""Captioning a bucket in a pipeline: one step plans, some workers caption, one step merges."""

from typing import Any

from model_lib.batch.planning import output_folder, resolve, write_plan
from model_lib.io import storage
from model_lib.io.locks import output_lock
from model_lib.steps.form import Options, batch_config


def plan_captions(
    images: str, output: str, model: str, options: Options, workers: int, below: str = ""
) -> tuple[str, list[dict[str, Any]]]:
    """Write the plan; return its reference below `output`, and an item for each worker.

    Args:
        images: folder, archive or list; "": none.
        output: the pipeline's.
        model: as for `captioner batch`.
        options: further options of it.
        workers: at most so many.
        below: folder in the output for the captions.

    The items are short, whatever the size of the plan: Argo takes arguments of 128 KiB at most, and
    the whole workflow 1 MiB. There is one at least, as kfp.local needs it.
    """
    if not images:
        return "", [{}]
    folder = storage.join(output, below) if below else output
    config = resolve(batch_config(images, folder, model, options))
    folder = output_folder(config)
    with output_lock(folder):
        plan = write_plan(config, folder)
    reference = plan.reference.removeprefix(f"{output.rstrip('/')}/")
    count = max(1, min(int(workers), len(plan.missing())))
    item = {"plan": reference, "workers": count}
    return reference, [{**item, "worker": worker} for worker in range(count)]
