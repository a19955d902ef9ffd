"""Captions and their pictures, from wherever they are, to Parquet shards and a manifest."""
