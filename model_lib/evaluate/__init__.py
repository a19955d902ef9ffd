"""Evaluating a model: scores with intervals, what people wrote beside what it says, and a page of
it all."""
