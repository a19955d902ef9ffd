"""Runs on an MLflow server, which may be away; `metrics.jsonl` has their points.

Knows nothing of models and data; mlflow is imported inside functions.
"""
