"""The model in MLflow's registry: promotion, packaging, serving and rollback.

mlflow is imported inside functions; only `serving.py`, which MLflow loads, imports it at the top.
"""
