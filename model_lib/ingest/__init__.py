"""Captions and images of any form to shards. Knows the data set's format, and no model."""
