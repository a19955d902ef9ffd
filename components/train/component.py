"""Train: one candidate, from the data set to its best model."""

from kfp import dsl

from components import MODEL


@dsl.component(base_image=MODEL, install_kfp_package=False)
def train(candidate: dict, model: dsl.Output[dsl.Model]) -> str:
    """Train the candidate, or go on from its last checkpoint; return its model's URI."""
    from dataclasses import asdict

    from model_lib.steps.candidates import candidate_config
    from model_lib.tracking.server import tracking_from_environment
    from model_lib.train.launch import train_here

    config = candidate_config(candidate)
    trained = train_here(config, tracking_from_environment())
    model.metadata.update(asdict(trained), checkpoints=config.output)
    return trained.model
