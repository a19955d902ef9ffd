"""Merge: every image that was listed has its row; counts and a summary."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def merge(
    run_name: str,
    plans: list,
    captions: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Check the shards of a plan once they are captioned, each of which tells its plan; count what
    they hold.

    With it a run has succeeded.
    """
    from dataclasses import asdict

    from model_lib.batch.merging import merge_planned, summary_markdown
    from model_lib.exits import exit_in_one_line
    from model_lib.io.storage import read_bytes, write_bytes, write_json
    from model_lib.steps.artifacts import set_metadata
    from model_lib.steps.closing import finish_pipeline
    from model_lib.steps.kfp_runs import run_title
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        merged = merge_planned(plans[0])
        write_json(captions.path, asdict(merged))
        set_metadata(captions, **asdict(merged))
        write_bytes(report.path, read_bytes(merged.report))
        write_bytes(summary.path, summary_markdown(merged).encode())
        finish_pipeline(run_title(run_name), tracking_from_environment())
