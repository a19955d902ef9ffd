"""The model in MLflow's registry: promotion, packaging, serving and rollback.

The only place that knows what `models:/…` means. mlflow is imported inside functions, but in
`serving.py`, which MLflow loads.
"""
