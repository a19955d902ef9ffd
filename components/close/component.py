"""Close: end what the run left open in MLflow, and notify a webhook."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def close(status: dsl.PipelineTaskFinalStatus, run_name: str) -> None:
    """End the pipeline's run in MLflow, unless its last step did; notify the webhook, if any."""
    from model_lib.exits import exit_in_one_line
    from model_lib.steps.closing import close_pipeline
    from model_lib.tracking.server import do_not_wait_long

    with exit_in_one_line():
        do_not_wait_long()
        close_pipeline(run_name, status.state)
