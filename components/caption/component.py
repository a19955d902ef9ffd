"""Caption: one shard of the pictures that were planned."""

from kfp import dsl

from components import MODEL


@dsl.component(base_image=MODEL, install_kfp_package=False)
def caption(output: str, shard: int) -> int:
    """Caption shard number `shard` of the plan in `output`, unless its file is there; return the shard's number."""
    from model_lib.batch import caption_planned
    from model_lib.tracking import tracking_from_environment

    tracking_from_environment()
    caption_planned(output, shard)
    return shard
