"""The pipeline `train_captioner`: ingest, train and evaluate candidates, register the winner, caption a folder.

data_dataset ─ ingest ─┬─ for each candidate: train ─ evaluate ─┬─ register ─ caption
                       └─ judge the champion ───────────────────┘
"""

from typing import Any

from kfp import dsl

from components.caption.component import caption
from components.evaluate.component import evaluate
from components.ingest.component import ingest
from components.judge.component import judge
from components.register.component import register
from components.train.component import train
from model_lib.config import EvaluateConfig, IngestConfig, RegisterConfig, TrainConfig

CANDIDATES: list[dict[str, Any]] = [{"name": "five-captions"}, {"name": "one-caption", "captions_per_picture": 1}]
"""By default: learning all captions of a picture in each step, or its first alone."""

DESCRIPTION = """\
Trains image captioners, judges them, registers the best in MLflow and captions a folder with the champion.

| parameter | meaning |
|---|---|
| `data_dataset` | folder or URI: `annotations/captions_{train,val}2017.json`, `train2017/`, `val2017/` |
| `data_output` | folder or URI for the Parquet shards |
| `data_shortest_side` | larger pictures are reduced to this many pixels on their shorter side |
| `train_candidates` | list of candidates, each a name and the training options in which it differs |
| `train_checkpoint_uri` | folder or URI for checkpoints and models; a rerun resumes from it |
| `train_preset` | model size: `clip-l-gpt2-medium`, or `tiny` (from scratch) |
| `train_vision`, `train_decoder`, `train_tokenizer` | hub names, folders or URIs of other weights than the preset's |
| `train_epochs`, `train_batch_size`, `train_learning_rate` | 0: the preset's |
| `train_precision` | `auto`, `bfloat16`, `float16` or `float32` |
| `eval_num_beams`, `eval_limit` | beams in decoding; first so many validation pictures only (0: all) |
| `register_metric`, `register_min_gain` | the score that decides, and how much better than the champion it must be |
| `caption_images`, `caption_output` | pictures that the champion captions at the end, and where to; empty: none |
"""


def define(parallel_candidates: int) -> Any:
    """Return the pipeline; at most `parallel_candidates` train at the same time."""

    @dsl.pipeline(name="train-captioner", description=DESCRIPTION)
    def train_captioner(
        data_dataset: str,
        data_output: str,
        train_checkpoint_uri: str,
        data_shortest_side: int = IngestConfig.shortest_side,
        train_candidates: list = CANDIDATES,
        train_preset: str = TrainConfig.preset,
        train_vision: str = "",
        train_decoder: str = "",
        train_tokenizer: str = "",
        train_epochs: int = TrainConfig.epochs,
        train_batch_size: int = TrainConfig.batch_size,
        train_learning_rate: float = TrainConfig.learning_rate,
        train_precision: str = TrainConfig.precision,
        eval_num_beams: int = EvaluateConfig.num_beams,
        eval_limit: int = EvaluateConfig.limit,
        register_metric: str = RegisterConfig.metric,
        register_min_gain: float = RegisterConfig.min_gain,
        caption_images: str = "",
        caption_output: str = "",
    ) -> None:
        ingested = ingest(dataset=data_dataset, output=data_output, shortest_side=data_shortest_side)
        # What lies at a URI is not among the inputs, nor who is champion: cached answers could be old ones.
        ingested.set_display_name("Ingest").set_caching_options(False)
        data = ingested.outputs["data"]

        judged = judge(data=data, num_beams=eval_num_beams, limit=eval_limit, output=train_checkpoint_uri)
        judged.set_display_name("Judge the champion").set_caching_options(False)

        with dsl.ParallelFor(train_candidates, name="Candidates", parallelism=parallel_candidates) as candidate:
            trained = train(
                data=data,
                candidate=candidate,
                checkpoint_uri=train_checkpoint_uri,
                preset=train_preset,
                vision=train_vision,
                decoder=train_decoder,
                tokenizer=train_tokenizer,
                epochs=train_epochs,
                batch_size=train_batch_size,
                learning_rate=train_learning_rate,
                precision=train_precision,
            )
            trained.set_display_name("Train")
            model_uri = trained.outputs["Output"]
            evaluated = evaluate(data=data, model_uri=model_uri, num_beams=eval_num_beams, limit=eval_limit)
            evaluated.set_display_name("Evaluate")

        registered = register(
            evaluations=dsl.Collected(evaluated.outputs["Output"]),
            champion_evaluation=judged.output,
            metric=register_metric,
            min_gain=register_min_gain,
        )
        registered.set_display_name("Register").set_caching_options(False)

        with dsl.If(caption_images != "", name="Pictures to caption"):
            captioned = caption(images=caption_images, output=caption_output, model_uri=registered.outputs["Output"])
            captioned.set_display_name("Caption").set_caching_options(False)

    return train_captioner


train_captioner = define(parallel_candidates=4)
