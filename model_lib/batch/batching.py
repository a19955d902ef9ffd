"""Captioning a folder, a bucket or a list of images, in one process: plan, caption, merge.

The pipeline does the same in steps, which share only the plan.
"""

from model_lib.batch.captions import caption_shards, load_model
from model_lib.batch.config import BatchConfig
from model_lib.batch.merging import Summary, merge
from model_lib.batch.planning import output_folder, resolve, write_plan
from model_lib.io.locks import output_lock


def batch(config: BatchConfig) -> Summary:
    """Caption all images of `config.images`.

    Raises:
        UserError: images, model or output cannot be used.
        WorkError: a store failed, or another run is at work in the output.
    """
    config = resolve(config)
    model = load_model(config)
    folder = output_folder(config)
    with output_lock(folder):
        plan = write_plan(config, folder)
        if missing := plan.missing():
            caption_shards(plan, missing, model)
        return merge(plan)
