"""Preflight: check that everything which the pipeline needs is there."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def preflight(
    run_name: str,
    output: str,
    images: str,
    caption_options: dict,
    caption_workers: int,
    secret_name: str,
    model: str = "",
    data: str = "",
    ingest_options: dict = {},
    ingest_workers: int = 1,
    preset: str = "",
    candidates: list = [],
    train_options: dict = {},
    eval_options: dict = {},
    register_options: dict = {},
    nodes: int = 1,
    image: str = "",
    cpu: int = 0,
    memory: int = 0,
    gpu_resource: str = "",
    gpu_count: str = "0",
    gpu_node_selector: dict = {},
    gpu_tolerations: list = [],
    secret_variables: dict = {},
) -> list[int]:
    """Check parameters, data, weights, MLflow and the secret; then open the run in MLflow.

    Return the numbers of the workers that help to ingest.
    """
    from model_lib.exits import exit_in_one_line
    from model_lib.steps.form import read_form
    from model_lib.steps.kfp_runs import run_state, run_title
    from model_lib.steps.preflight import preflight
    from model_lib.tracking.server import (
        adopt_secret,
        do_not_wait_long,
        require_mlflow,
        tracking_from_environment,
    )
    from model_lib.train.trainjob import Machines

    with exit_in_one_line():
        adopt_secret()
        do_not_wait_long()
        form = read_form(
            output=output,
            images=images,
            caption_options=caption_options,
            caption_workers=caption_workers,
            data=data,
            ingest_options=ingest_options,
            ingest_workers=ingest_workers,
            preset=preset,
            candidates=candidates,
            train_options=train_options,
            eval_options=eval_options,
            register_options=register_options,
        )
        machines = Machines(
            nodes=nodes,
            image=image,
            cpu=cpu,
            memory=memory,
            gpu_resource=gpu_resource,
            gpu_count=gpu_count,
            gpu_node_selector=gpu_node_selector,
            gpu_tolerations=gpu_tolerations,
            secret_name=secret_name,
            secret_variables=secret_variables,
        )
        preflight(form, output=output, model=model, machines=machines, secret=secret_name)
        tracking = require_mlflow(tracking_from_environment())
        tracking.open_pipeline(run_title(run_name), run_state)
        return list(range(1, max(2, int(ingest_workers))))  # kfp.local needs one
