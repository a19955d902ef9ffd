"""Plan: list a bucket's images and split them into shards."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def plan(
    images: str,
    output: str,
    model: str,
    options: dict,
    workers: int,
    plan: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> list[dict]:
    """Write the plan; output its place below `output`, and return what each worker must know."""
    from model_lib.exits import exit_in_one_line
    from model_lib.io.storage import write_bytes
    from model_lib.steps.captioning import plan_captions
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        tracking_from_environment()
        reference, parts = plan_captions(images, output, model, options, workers)
        write_bytes(plan, reference.encode())
        return parts
