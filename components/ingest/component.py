"""Ingest: captions and images to Parquet shards and a manifest."""

from typing import NamedTuple

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def ingest(
    dataset: str, output: str, shortest_side: int, options: dict, data: dsl.Output[dsl.Dataset]
) -> NamedTuple("Ingested", [("manifest", str), ("fingerprint", str)]):  # type: ignore[valid-type]
    """Write shards under `output`; the artifact is their manifest, which holds their URIs."""
    from model_lib.exits import exit_in_one_line
    from model_lib.ingest.config import ingest_config
    from model_lib.ingest.ingesting import ingest as run
    from model_lib.io.storage import join, write_json
    from model_lib.steps.artifacts import set_metadata

    with exit_in_one_line():
        manifest = run(ingest_config(dataset, output, shortest_side, options))
        write_json(data.path, manifest.located(manifest.uri).to_dict())
        counts = {**manifest.counts, "quarantined": manifest.quarantined}
        set_metadata(data, **counts, fingerprint=manifest.fingerprint)
        return (join(manifest.uri, "manifest.json"), manifest.fingerprint)
