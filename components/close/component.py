"""Close: whatever became of the run, end what it left open in MLflow and notify a webhook."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def close(status: dsl.PipelineTaskFinalStatus, run_name: str) -> None:
    """End the pipeline's run in MLflow as failed, unless its last step ended it; notify the secret's webhook, if any.

    By `status` a step is known as one that ends a run; what it says is not used, see `close_pipeline`.
    """
    from model_lib.exits import exit_in_one_line
    from model_lib.steps.closing import close_pipeline
    from model_lib.steps.kfp_runs import run_title
    from model_lib.tracking.server import do_not_wait_long, tracking_from_environment

    with exit_in_one_line():
        do_not_wait_long()
        close_pipeline(run_title(run_name), tracking_from_environment)
