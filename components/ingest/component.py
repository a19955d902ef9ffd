"""Ingest: captions and pictures in COCO's layout to Parquet shards and a manifest."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(dataset: str, output: str, shortest_side: int, data: dsl.Output[dsl.Dataset]) -> None:
    """Write shards under `output`; the artifact is their manifest, which names them by URI."""
    from model_lib.config import IngestConfig
    from model_lib.ingest import ingest as run
    from model_lib.storage import write_json

    manifest = run(IngestConfig(dataset=dataset, output=output, shortest_side=shortest_side))
    write_json(data.path, manifest.located(manifest.uri).to_dict())
    data.metadata.update(manifest.counts, quarantined=manifest.quarantined, fingerprint=manifest.fingerprint)
