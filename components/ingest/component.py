"""Ingest: captions and images to Parquet shards and a manifest; and each candidate's options."""

from typing import NamedTuple

from kfp import dsl

from components import CORE


@dsl.component(base_image=CORE, install_kfp_package=False)
def ingest(
    data: str,
    output: str,
    options: dict,
    workers: int,
    preset: str,
    candidates: list,
    train_options: dict,
    dataset: dsl.Output[dsl.Dataset],
) -> NamedTuple(  # type: ignore[valid-type]
    "Ingested", [("manifest", str), ("fingerprint", str), ("candidates", list[dict])]
):
    """Write shards under `output`; the artifact is their manifest, which holds their URIs."""
    from model_lib.exits import exit_in_one_line
    from model_lib.ingest.ingesting import ingest as run
    from model_lib.io.storage import join, write_json
    from model_lib.steps.artifacts import set_metadata
    from model_lib.steps.candidates import configure_candidates
    from model_lib.steps.form import candidate_configs, ingest_config
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        tracking_from_environment()  # a candidate may start from a model of the registry
        manifest = run(ingest_config(data, output, options), int(workers))
        write_json(dataset.path, manifest.located(manifest.uri).to_dict())
        counts = {**manifest.counts, "quarantined": manifest.quarantined}
        set_metadata(dataset, **counts, fingerprint=manifest.fingerprint)
        uri, fingerprint = join(manifest.uri, "manifest.json"), manifest.fingerprint
        configs = candidate_configs(candidates, preset, train_options)
        root = join(output, "candidates")
        return (uri, fingerprint, configure_candidates(configs, uri, fingerprint, root))
