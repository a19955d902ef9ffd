"""Caption: one shard of a plan."""

from kfp import dsl

from components import MODEL


@dsl.component(base_image=MODEL, install_kfp_package=False)
def caption(shard: dict) -> str:
    """Caption a shard of a plan, unless its file is there; return the plan's reference."""
    from model_lib.batch.captions import caption_planned
    from model_lib.exits import exit_in_one_line
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        tracking_from_environment()
        caption_planned(shard["plan"], int(shard["shard"]))  # KFP passes all numbers as floats
        return shard["plan"]
