"""Help to ingest: write some of the shards, while Ingest writes others."""

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def ingest_help(worker: int, workers: int, data: str, output: str, options: dict) -> None:
    """Write the shards of a worker, from 1 to `workers` - 1, until the data set is whole."""
    from model_lib.exits import exit_in_one_line
    from model_lib.ingest.ingesting import help_ingest
    from model_lib.steps.form import ingest_config

    with exit_in_one_line():
        help_ingest(ingest_config(data, output, options), int(worker), int(workers))
