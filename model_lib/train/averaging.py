"""One model of several: the mean of their weights."""

import tempfile
from collections.abc import Sequence

import torch

from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.io.errors import store_errors
from model_lib.model.captioner import Captioner
from model_lib.model.sources import lasting_source


def average(models: Sequence[str], output: str, name: str = "average") -> list[str]:
    """Write the model whose weights are the mean of several models' weights.

    Models that were trained from the same start, as the seeds or the last epochs of one recipe, are
    close enough for that (Wortsman et al., 2022, "Model soups").

    Args:
        models: their folders, hub names, URIs or names in the registry.
        output: folder or URI for the mean.
        name: of the mean.

    Returns:
        The models, by names that mean the same later.

    Raises:
        UserError: a model cannot be loaded, or they are not of one kind.
    """
    if len(models) < 2:
        raise UserError("models: a mean is of two models or more")
    sources = [lasting_source(source) for source in models]
    storage.require_writable(output)
    first = _load(sources[0])
    mean = {name: tensor.double() for name, tensor in first.state_dict().items()}
    for source in sources[1:]:
        _add(mean, first, _load(source), source, sources[0])
    weights = {name: (total / len(sources)).float() for name, total in mean.items()}
    record = {"name": name, "averaged": sources, "mlflow_run_id": None}
    with tempfile.TemporaryDirectory() as scratch:
        with store_errors(scratch, "written"):
            first.save_pretrained(scratch, state_dict=weights)
        storage.upload_folder(scratch, output)
    storage.write_json(storage.join(output, "training.json"), first.training_record | record)
    return sources


def _load(source: str) -> Captioner:
    return Captioner.from_pretrained(source, device="cpu", dtype=torch.float32).train()


def _add(
    total: dict[str, torch.Tensor], first: Captioner, other: Captioner, source: str, model: str
) -> None:
    """Add the weights of `other` to the total, if they are of the same kind as the first model's.

    Raises:
        UserError: they are not.
    """
    weights = other.state_dict()
    differences = [
        name
        for name in sorted(total.keys() | weights.keys())
        if name not in total or name not in weights or total[name].shape != weights[name].shape
    ]
    if differences:
        raise UserError(
            f"{source}: cannot be averaged with {model}: {differences[0]} is of another shape"
        )
    if other.preprocess != first.preprocess:
        raise UserError(f"{source}: sees images otherwise than {model}; they cannot be averaged")
    if other.tokenizer.get_vocab() != first.tokenizer.get_vocab():
        raise UserError(f"{source}: has another tokenizer than {model}; they cannot be averaged")
    for name, tensor in weights.items():
        total[name] += tensor
