"""Train: one candidate, from the data set to its best model."""

from kfp import dsl

from components import MODEL


@dsl.component(base_image=MODEL, install_kfp_package=False)
def train(candidate: dict, model: dsl.Output[dsl.Model]) -> None:
    """Train the candidate, or resume from its last checkpoint."""
    from dataclasses import asdict

    from model_lib.exits import exit_in_one_line
    from model_lib.steps.artifacts import write_model
    from model_lib.steps.candidates import candidate_config
    from model_lib.tracking.server import tracking_from_environment
    from model_lib.train.launch import train_here

    with exit_in_one_line():
        config = candidate_config(candidate)
        trained = train_here(config, tracking_from_environment())
        write_model(model, **asdict(trained), checkpoints=config.output)
