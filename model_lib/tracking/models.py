"""The data sets and models of runs, as MLflow's tables show them."""

import json
import re
from typing import Any

from model_lib.io import storage
from model_lib.tracking.runs import RunData

LONGEST_DIGEST = 36
"""Characters that MLflow's database holds of a data set's digest."""
EXTERNAL_TAG = "mlflow.model.isExternal"
"""Tag of a model whose files MLflow does not have: see `mlflow.create_external_model`."""
NOTE_TAG = "mlflow.note.content"
"""What MLflow shows as the description of a run or a model."""


def log_data(client: Any, run_id: str, data: RunData) -> None:
    """Add a data set to a run's inputs; one that is there stays as it is."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    source_type = "local" if storage.is_local(data.uri) else data.uri.partition(":")[0]
    source, profile = json.dumps({"uri": data.uri}), json.dumps({"num_rows": data.images})
    digest = data.digest[:LONGEST_DIGEST]
    dataset = Dataset(data.name, digest, source_type, source, profile=profile)
    tag = InputTag("mlflow.data.context", data.context)
    inputs = [DatasetInput(dataset, [tag])]
    try:
        client.log_inputs(run_id, datasets=inputs)
    except MlflowException as error:
        if error.error_code != "BAD_REQUEST":
            raise
        # Another candidate's process has just created the same data set, which is now there.
        client.log_inputs(run_id, datasets=inputs)


def ensure_model(client: Any, run_id: str, uri: str) -> str:
    """Return the id of the model that a run made, created if need be; its files stay at `uri`."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    model = next((model for model in models if EXTERNAL_TAG in model.tags), None)
    if model is None:
        name = re.sub(r"[/:.%\"']", "-", run.info.run_name)  # MLflow takes none of these
        tags = {EXTERNAL_TAG: "true", NOTE_TAG: uri}
        model = client.create_logged_model(experiment, name, source_run_id=run_id, tags=tags)
    if model.status != "READY":
        client.finalize_logged_model(model.model_id, "READY")
    outputs = run.outputs.model_outputs if run.outputs else []
    if all(output.model_id != model.model_id for output in outputs):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return str(model.model_id)
