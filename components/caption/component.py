"""Caption: a folder or bucket of pictures, captioned by the champion into Parquet."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def caption(images: str, output: str, model_uri: str, captions: dsl.Output[dsl.Artifact]) -> None:
    """Caption every picture under `images`; the artifact's metadata holds the counts and where the Parquet lies."""
    from dataclasses import asdict

    from model_lib.batch import batch
    from model_lib.config import BatchConfig
    from model_lib.storage import write_json
    from model_lib.tracking import tracking_from_environment

    tracking_from_environment()
    summary = batch(BatchConfig(images=images, output=output, model=model_uri))
    write_json(captions.path, asdict(summary))
    captions.metadata.update(asdict(summary))
