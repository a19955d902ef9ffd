"""Train: one candidate, from the data set to its best model."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    data: dsl.Input[dsl.Dataset],
    candidate: dict,
    checkpoint_uri: str,
    preset: str,
    vision: str,
    decoder: str,
    tokenizer: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    precision: str,
    model: dsl.Output[dsl.Model],
) -> str:
    """Train with the options given, `candidate`'s own over them, resuming from `checkpoint_uri`; return its URI."""
    from model_lib.candidates import candidate_config
    from model_lib.tracking import tracking_from_environment
    from model_lib.training import train as run

    config = candidate_config(
        data.path,
        checkpoint_uri,
        candidate,
        preset=preset,
        vision=vision,
        decoder=decoder,
        tokenizer=tokenizer,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        precision=precision,
    )
    trained = run(config, tracking_from_environment())
    model.metadata.update(uri=trained.model, validation_loss=trained.validation_loss, steps=trained.steps)
    return trained.model
