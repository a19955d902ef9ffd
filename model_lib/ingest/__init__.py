"""Captions and their images, from wherever they are, to Parquet shards and a manifest."""
