"""Plan: a bucket's pictures, listed once and split into shards."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def plan(images: str, output: str, model: str, num_beams: int, shard_pictures: int) -> list[int]:
    """Write the plan to `output`; return the shards still to be captioned, or the first: kfp.local needs one."""
    from model_lib.batch import begin
    from model_lib.batch import plan as run
    from model_lib.config import BatchConfig
    from model_lib.tracking import tracking_from_environment

    tracking_from_environment()
    config = BatchConfig(images=images, output=output, model=model, num_beams=num_beams, shard_pictures=shard_pictures)
    return begin(run(config), output) or [0]
