"""Register: the best candidate becomes a version of the model, and champion if it is better."""

from typing import NamedTuple

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def register(
    run_name: str,
    evaluations: list,
    champion_evaluation: str,
    options: dict,
    output: str,
    images: str,
    caption_options: dict,
    caption_workers: int,
    decision: dsl.Output[dsl.Markdown],
    report: dsl.Output[dsl.HTML],
    model: dsl.Output[dsl.Model],
) -> NamedTuple("Registered", [("plan", str), ("workers", list[dict])]):  # type: ignore[valid-type]
    """Register the best of `evaluations`; plan the captioning of `images`, if any, by the champion.

    Without `images` it is the run's last step.
    """
    from model_lib.exits import exit_in_one_line
    from model_lib.io.storage import read_bytes, write_bytes
    from model_lib.registry.model_uris import version_uri
    from model_lib.registry.registry import register as run
    from model_lib.steps.artifacts import set_metadata, write_model
    from model_lib.steps.captioning import plan_captions
    from model_lib.steps.closing import finish_pipeline
    from model_lib.steps.form import register_config
    from model_lib.steps.outcome import decision_markdown, log_outcome, serving_model
    from model_lib.tracking.server import require_mlflow, tracking_from_environment

    with exit_in_one_line():
        tracking = require_mlflow(tracking_from_environment())
        registered = run(register_config(options, evaluations, champion_evaluation), tracking)
        write_bytes(decision.path, decision_markdown(registered, tracking).encode())
        write_bytes(report.path, read_bytes(registered.page))
        set_metadata(decision, **registered.to_dict())
        version = registered.version
        names = {"name": version_uri(version), "version": version}
        write_model(model, model=registered.model, **names, champion=registered.promoted)
        log_outcome(registered, tracking)
        serving = serving_model(registered)
        finish_pipeline(run_name, last=not images)
        planning = (images, output, serving, caption_options, caption_workers)
        return plan_captions(*planning, below="captions")
