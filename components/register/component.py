"""Register: the best candidate becomes a version of the model, and champion if it is better."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def register(
    run_name: str,
    evaluations: list,
    champion_evaluation: str,
    metric: str,
    min_gain: float,
    max_regression: float,
    max_slowdown: float,
    images: str,
    decision: dsl.Output[dsl.Markdown],
    page: dsl.Output[dsl.HTML],
    model: dsl.Output[dsl.Model],
) -> str:
    """Register the best of `evaluations`; return the champion's model URI.

    It is the run's last step if there are no `images` to caption.
    """
    from model_lib.exits import exit_in_one_line
    from model_lib.io.storage import read_bytes, write_bytes
    from model_lib.registry.config import RegisterConfig
    from model_lib.registry.model_uris import version_uri
    from model_lib.registry.registry import register as run
    from model_lib.steps.artifacts import set_metadata, write_model
    from model_lib.steps.closing import finish_pipeline
    from model_lib.steps.outcome import decision_markdown, log_outcome, serving_model
    from model_lib.tracking.server import require_mlflow, tracking_from_environment

    with exit_in_one_line():
        config = RegisterConfig(
            evaluations=tuple(evaluations),
            champion_evaluation=champion_evaluation,
            metric=metric,
            min_gain=min_gain,
            max_regression=max_regression,
            max_slowdown=max_slowdown,
        )
        tracking = require_mlflow(tracking_from_environment())
        registered = run(config, tracking)
        write_bytes(decision.path, decision_markdown(registered, tracking).encode())
        write_bytes(page.path, read_bytes(registered.page))
        set_metadata(decision, **registered.to_dict())
        version = registered.version
        names = {"name": version_uri(version), "version": version}
        write_model(model, model=registered.model, **names, champion=registered.promoted)
        log_outcome(registered, tracking)
        serving = serving_model(registered)
        finish_pipeline(run_name, last=not images)
        return serving
