"""Ingest: captions and images to Parquet shards and a manifest; and each candidate's options."""

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
    manifest: dsl.OutputPath(str),  # type: ignore[valid-type]
    fingerprint: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> list[dict]:
    """Write shards under `output`; return each candidate's options.

    The artifact is the manifest, which holds the shards' URIs.
    """
    from model_lib.exits import exit_in_one_line
    from model_lib.ingest.ingesting import ingest as run
    from model_lib.io.storage import join, write_bytes, write_json
    from model_lib.steps.artifacts import set_metadata
    from model_lib.steps.candidates import configure_candidates
    from model_lib.steps.form import candidate_configs, ingest_config
    from model_lib.tracking.server import tracking_from_environment

    with exit_in_one_line():
        tracking_from_environment()  # a candidate may start from a model of the registry
        ingested = run(ingest_config(data, output, options), int(workers))
        write_json(dataset.path, ingested.located(ingested.uri).to_dict())
        counts = {**ingested.counts, "quarantined": ingested.quarantined}
        set_metadata(dataset, **counts, fingerprint=ingested.fingerprint)
        uri = join(ingested.uri, "manifest.json")
        write_bytes(manifest, uri.encode())
        write_bytes(fingerprint, ingested.fingerprint.encode())
        configs = candidate_configs(candidates, preset, train_options)
        root = join(output, "candidates")
        return configure_candidates(configs, uri, ingested.fingerprint, root)
