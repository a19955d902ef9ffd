"""Runs and models on an MLflow server, which may be away."""
