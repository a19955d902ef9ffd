"""Captioning a folder, a bucket or a list of pictures: plan, caption each shard, merge.

    <output>/<model>-<key>/plan.json            what captions, and the shards; the key: images, weights, options
                           listing-….parquet    the pictures of each shard, a row group each
                           captions/*.parquet   one file a shard, written whole or not at all
                           summary.json         counts a status and reason
                           report.html          the same for people, with pictures
             latest.json                        the last summary

Every picture listed has exactly one row, with a status. Started again, only pictures that are new or changed, or that
could not be read but may be now, are captioned; rows of pictures no longer listed are removed. Other pictures, another
model, another version of it or other options have a folder of their own. A shard's file is named after the pictures in
it, so that a file of that name is always the finished shard.
"""
