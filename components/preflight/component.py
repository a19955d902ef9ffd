"""Preflight: everything that the pipeline needs is there, or the run ends here and says what is missing."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def preflight(
    run_name: str,
    secret_name: str,
    secret_keys: list,
    candidates: list,
    dataset: str = "",
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
    train_nodes: int = 1,
    metric: str = "CIDEr",
    min_gain: float = 0.0,
    max_loss: float = 0.0,
    max_slowdown: float = 0.0,
) -> None:
    """Check options, places, weights, MLflow and secrets (empty: none needed), then open the run in MLflow."""
    from model_lib.registry.config import Policy
    from model_lib.steps.preflight import Needs, preflight, require_judging, training_sources
    from model_lib.tracking.server import adopt_secret, do_not_wait_long, tracking_from_environment

    adopt_secret()
    do_not_wait_long()
    policy = Policy(metric=metric, min_gain=min_gain, max_loss=max_loss, max_slowdown=max_slowdown)
    require_judging(policy, num_beams=num_beams, limit=limit, clip=clip)
    weights, tokenizers = training_sources(
        candidates,
        preset=preset,
        vision=vision,
        decoder=decoder,
        tokenizer=tokenizer,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        precision=precision,
    )
    preflight(
        Needs(
            dataset=dataset,
            folders=[images],
            outputs=[data_output, checkpoint_uri, caption_output],
            weights=[model, clip, *weights],
            tokenizers=tokenizers,
            machines=train_nodes,
            pairs={"caption_images": images, "caption_output": caption_output},
            secret=secret_name,
            keys=secret_keys,
        )
    )
    tracking_from_environment().open_pipeline(run_name)
