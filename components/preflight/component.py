"""Preflight: check that everything which the pipeline needs is there."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def preflight(
    run_name: str,
    secret_name: str,
    secret_keys: list,
    candidates: list,
    dataset: str = "",
    shortest_side: int = 0,
    ingest_options: dict = {},
    images: str = "",
    model: str = "",
    preset: str = "",
    vision: str = "",
    decoder: str = "",
    tokenizer: str = "",
    epochs: int = 0,
    batch_size: int = 0,
    learning_rate: float = 0.0,
    precision: str = "",
    num_beams: int = 1,
    limit: int = 0,
    clip: str = "",
    data_output: str = "",
    checkpoint_uri: str = "",
    caption_output: str = "",
    metric: str = "CIDEr",
    min_gain: float = 0.0,
    max_regression: float = 0.0,
    max_slowdown: float = 0.0,
    nodes: int = 1,
    image: str = "",
    cpu: int = 0,
    memory: int = 0,
    gpu_resource: str = "",
    gpu_count: str = "0",
    gpu_node_selector: dict = {},
    gpu_tolerations: list = [],
    secret_variables: dict = {},
) -> None:
    """Check options, data, weights, MLflow and secrets; then open the run in MLflow."""
    from model_lib.exits import exit_in_one_line
    from model_lib.ingest.config import ingest_config
    from model_lib.registry.config import Policy
    from model_lib.steps.candidates import candidate_configs
    from model_lib.steps.kfp_runs import run_state, run_title
    from model_lib.steps.preflight import preflight, require_evaluation
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
        policy = Policy(
            metric=metric,
            min_gain=min_gain,
            max_regression=max_regression,
            max_slowdown=max_slowdown,
        )
        require_evaluation(policy, num_beams=num_beams, limit=limit, clip=clip)
        training = {
            "preset": preset,
            "vision": vision,
            "decoder": decoder,
            "tokenizer": tokenizer,
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "precision": precision,
        }
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
        data = (dataset, data_output, shortest_side, ingest_options)
        preflight(
            data=ingest_config(*data) if data_output else None,
            images=images,
            caption_output=caption_output,
            outputs=[data_output, checkpoint_uri],
            weights=[model, clip],
            candidates=candidate_configs(candidates, **training) if candidates else [],
            machines=machines,
            secret=secret_name,
            keys=secret_keys,
        )
        tracking = require_mlflow(tracking_from_environment())
        tracking.open_pipeline(run_title(run_name), run_state)
