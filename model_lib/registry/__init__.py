"""Who becomes champion, and the model as MLflow keeps and serves it."""
