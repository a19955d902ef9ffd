"""The data set on disk: what ingest wrote, read back in batches."""
