"""Training one candidate, from the data set to the best model, on one process or many.

Ingest, evaluation and the registry may not come in.
"""
