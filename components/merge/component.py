"""Merge: check that every listed image has a row, and count the rows."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def merge(
    run_name: str,
    output: str,
    plan: str,
    shards: list,
    captions: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Check and count the captions of a plan, after its workers, which return their `shards`.

    It is the run's last step.
    """
    from dataclasses import asdict

    from model_lib.batch.merging import merge_planned, summary_markdown
    from model_lib.exits import exit_in_one_line
    from model_lib.io.storage import join, read_bytes, write_bytes, write_json
    from model_lib.steps.artifacts import set_metadata
    from model_lib.steps.closing import finish_pipeline

    with exit_in_one_line():
        merged = merge_planned(join(output, plan))
        write_json(captions.path, asdict(merged))
        set_metadata(captions, **asdict(merged))
        write_bytes(report.path, read_bytes(merged.report))
        write_bytes(summary.path, summary_markdown(merged).encode())
        finish_pipeline(run_name)
