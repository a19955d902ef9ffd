"""Close: whatever became of the run, end what it left open in MLflow and send the outcome to a webhook."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def close(status: dsl.PipelineTaskFinalStatus, run_name: str) -> None:
    """End the pipeline's run in MLflow; if the secret names a webhook, post the outcome there."""
    from model_lib.closing import close_pipeline
    from model_lib.tracking import tracking_from_environment

    close_pipeline(run_name, status.state, status.error_message or "", tracking_from_environment())
