"""Data on disk: the shards that ingest wrote, and COCO's lists. Knows neither models nor ingest."""
