"""Evaluate: a candidate's scores and its report."""

from kfp import dsl

from components import EVALUATE


@dsl.component(base_image=EVALUATE, install_kfp_package=False)
def evaluate(
    candidate: dict,
    options: dict,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> str:
    """Evaluate the candidate's model; return the URI of the evaluation, which is kept beside it."""
    from model_lib.exits import exit_in_one_line
    from model_lib.io.storage import join, read_bytes, write_bytes
    from model_lib.steps.artifacts import set_metadata
    from model_lib.steps.candidates import candidate_config
    from model_lib.steps.evaluation import evaluate_model
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        config = candidate_config(candidate)
        model = join(config.output, "best")
        evaluation, folder = evaluate_model(
            model, config.data, config.output, options, tracking_from_environment()
        )
        set_metadata(metrics, **evaluation.figures())
        write_bytes(report.path, read_bytes(join(folder, "report.html")))
        return folder
