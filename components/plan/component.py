"""Plan: list a bucket's images and split them into shards."""

from typing import NamedTuple

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def plan(
    images: str,
    output: str,
    model: str,
    options: dict,
    workers: int,
) -> NamedTuple("Planned", [("plan", str), ("workers", list[dict])]):  # type: ignore[valid-type]
    """Write the plan; return its place below `output`, and what each worker needs to know."""
    from model_lib.exits import exit_in_one_line
    from model_lib.steps.captioning import plan_captions
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        tracking_from_environment()
        return plan_captions(images, output, model, options, workers)
