"""Caption metrics and their confidence intervals.

Needs no model but the CLIP of CLIPScore, and knows nothing of files of results or of MLflow.
"""
