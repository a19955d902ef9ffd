"""Preflight: everything that the pipeline needs is there, or the run ends here and says what is missing."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def preflight(
    run_name: str,
    dataset: str,
    images: str,
    model: str,
    candidates: list,
    preset: str,
    vision: str,
    decoder: str,
    tokenizer: str,
    clip: str,
    data_output: str,
    checkpoint_uri: str,
    caption_output: str,
    secret_name: str,
    secret_keys: list,
    train_nodes: int,
) -> None:
    """Check places, weights, MLflow and secrets (empty: not needed), then open the pipeline's run in MLflow."""
    from model_lib.steps.preflight import Needs, preflight, training_sources
    from model_lib.tracking.server import adopt_secret, do_not_wait_long, tracking_from_environment

    adopt_secret()
    do_not_wait_long()
    weights, tokenizers = training_sources(candidates, preset, vision, decoder, tokenizer)
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
