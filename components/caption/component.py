"""Caption: a worker's part of a plan."""

from kfp import dsl

from components import MODEL


@dsl.component(base_image=MODEL, install_kfp_package=False)
def caption(part: dict, output: str) -> int:
    """Caption the worker's shards whose files are not there; return how many these were."""
    from model_lib.batch.captions import caption_part
    from model_lib.exits import exit_in_one_line
    from model_lib.io.storage import join
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        tracking_from_environment()
        # KFP passes all numbers as floats.
        worker, workers = int(part["worker"]), int(part["workers"])
        return caption_part(join(output, part["plan"]), worker, workers)
