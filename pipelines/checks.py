"""What a pipeline's first step would refuse among its parameters, checked before anything is
uploaded; needs no server and no kfp."""

from collections.abc import Mapping
from typing import Any

from model_lib.steps.form import read_form
from model_lib.train.trainjob import Machines

MACHINES = ("gpu_resource", "gpu_count", "gpu_node_selector", "gpu_tolerations", "secret_name")


def check(pipeline: str, parameters: Mapping[str, Any]) -> None:
    """Raise `UserError` if a run of the pipeline with all these parameters would be refused."""
    form = dict(parameters)
    machines = {name: form.pop(name) for name in MACHINES}
    nodes = form.pop("train_nodes", 1)
    Machines(nodes=nodes, image="-", cpu=1, memory=1, secret_variables={}, **machines)
    if pipeline == "train_captioner":
        form["images"] = form.pop("caption_images")
    read_form(**form)
