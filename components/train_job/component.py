"""Train on several machines: one candidate, through a TrainJob of Kubeflow Trainer."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def train_job(
    candidate: dict,
    nodes: int,
    image: str,
    cpu: int,
    memory: int,
    gpu_resource: str,
    gpu_count: str,
    gpu_node_selector: dict,
    gpu_tolerations: list,
    secret_name: str,
    secret_variables: dict,
    model: dsl.Output[dsl.Model],
) -> None:
    """Train the candidate, or resume from its last checkpoint."""
    from model_lib.exits import exit_in_one_line
    from model_lib.steps.artifacts import write_model
    from model_lib.steps.candidates import candidate_config
    from model_lib.train.trainjob import Machines, train_on

    with exit_in_one_line():
        config = candidate_config(candidate)
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
        trained = train_on(machines, config, candidate["fingerprint"])
        write_model(model, **trained, checkpoints=config.output)
