"""Evaluation: a model's or a file's captions scored, and the report page.

Works on captions and references; training, the registry and the pipelines may not come in.
"""
