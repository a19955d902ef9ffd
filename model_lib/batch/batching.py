"""Captioning a folder, a bucket or a list of images, from start to end: plan, caption each shard,
merge.

Here one process does it all. The pipeline does the same in steps, which know of each other what is
in the plan.
"""

from model_lib.batch.captions import caption_shards, load_model
from model_lib.batch.config import BatchConfig
from model_lib.batch.merging import Summary, merge
from model_lib.batch.planning import folder_of, plan, resolved
from model_lib.io.locks import output_lock


def batch(config: BatchConfig) -> Summary:
    """Caption everything that `config.images` stands for, here and now.

    Raises:
        UserError: images, model or output cannot be used.
    """
    config = resolved(config)
    model = load_model(config)
    with output_lock(folder := folder_of(config)):
        made = plan(config, folder)
        missing = made.missing()
        if missing:
            caption_shards(made, missing, model)
        return merge(made)
