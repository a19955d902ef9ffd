"""Training one candidate, from the data set to the best model, on one process or many."""
