"""Merge: every picture that was listed has its row; counts and a summary."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def merge(output: str, shards: list, captions: dsl.Output[dsl.Artifact], summary: dsl.Output[dsl.Markdown]) -> None:
    """Check the shards of the plan in `output` once `shards` are captioned, and count what they hold."""
    from dataclasses import asdict

    from model_lib.batch import merge as run
    from model_lib.batch import read_plan, summary_markdown
    from model_lib.storage import write_bytes, write_json
    from model_lib.tracking import tracking_from_environment

    merged = run(read_plan(output))
    write_json(captions.path, asdict(merged))
    captions.metadata.update(asdict(merged))
    write_bytes(summary.path, summary_markdown(merged).encode())
    tracking_from_environment().mark("merge")
