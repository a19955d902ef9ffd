"""Plan: list a bucket's images and split them into shards."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def plan(
    images: str, output: str, model: str, num_beams: int, shard_images: int, options: dict
) -> list[dict]:
    """Write the plan; return the shards without captions, each with its plan's reference.

    If none is left, return the first: kfp.local needs one.
    """
    from model_lib.batch.config import BatchConfig
    from model_lib.batch.planning import output_folder, resolve, write_plan
    from model_lib.exits import exit_in_one_line
    from model_lib.io.locks import output_lock
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        tracking_from_environment()
        named: dict = {"images": images, "output": output, "model": model}
        named |= {"num_beams": num_beams, "shard_images": shard_images}
        config = resolve(BatchConfig.from_options(**{**named, **options}))
        folder = output_folder(config)
        with output_lock(folder):
            plan = write_plan(config, folder)
        return [{"plan": plan.reference, "shard": shard} for shard in plan.missing() or [0]]
