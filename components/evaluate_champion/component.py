"""Evaluate the champion, on the same data as the candidates."""

from kfp import dsl

from components import EVALUATE


@dsl.component(base_image=EVALUATE, install_kfp_package=False)
def evaluate_champion(manifest: str, fingerprint: str, options: dict, output: str) -> str:
    """Return the URI of the champion's evaluation under `output`; "" without a champion."""
    from model_lib.exits import exit_in_one_line
    from model_lib.io.storage import join
    from model_lib.steps.candidates import require_same_data
    from model_lib.steps.evaluation import evaluate_champion as run
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        require_same_data(manifest, fingerprint)
        return run(manifest, join(output, "candidates"), options, tracking_from_environment())
