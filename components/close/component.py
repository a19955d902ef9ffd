"""Close: whatever became of the run, end what it left open in MLflow and send the outcome to a webhook."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def close(status: dsl.PipelineTaskFinalStatus, run_name: str, registers: bool, images: str) -> None:
    """End the pipeline's run in MLflow, succeeded if it got to its last steps; tell the secret's webhook, if any.

    By `status` a step is known as one that ends a run; what it says is not used, see `close_pipeline`.
    """
    from model_lib.steps.closing import close_pipeline, last_steps
    from model_lib.tracking.server import do_not_wait_long, tracking_from_environment

    do_not_wait_long()
    close_pipeline(run_name, last_steps(registers, images), tracking_from_environment)
