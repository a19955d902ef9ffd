"""Candidates: the whole configuration of each."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def candidates(
    data: str,
    fingerprint: str,
    checkpoint_uri: str,
    cache_key: str,
    candidates: list,
    preset: str,
    vision: str,
    decoder: str,
    tokenizer: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    precision: str,
) -> list[dict]:
    """Return each candidate's options, its own over the common ones, with the data's
    fingerprint."""
    from model_lib.exits import exit_in_one_line
    from model_lib.steps.candidates import configure_candidates
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        tracking_from_environment()  # a candidate may start from a model of the registry
        return configure_candidates(
            data,
            fingerprint,
            checkpoint_uri,
            cache_key,
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
