"""Evaluate: a candidate's scores and its report."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    data: dsl.Input[dsl.Dataset],
    model_uri: str,
    num_beams: int,
    limit: int,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> str:
    """Judge the model at `model_uri`, keep the evaluation beside it, and return the evaluation's URI."""
    from model_lib.candidates import judge_model
    from model_lib.storage import join, read_bytes, write_bytes
    from model_lib.tracking import tracking_from_environment

    beside = model_uri.rpartition("/")[0]
    evaluation, folder = judge_model(
        model_uri, data.path, beside, tracking_from_environment(), num_beams=num_beams, limit=limit
    )
    for name, value in evaluation.scores.items():
        metrics.log_metric(name, value)
    metrics.log_metric("CIDEr_shuffled", evaluation.shuffled_cider)
    write_bytes(report.path, read_bytes(join(folder, "report.html")))
    return folder
