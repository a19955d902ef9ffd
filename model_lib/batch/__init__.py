"""Captioning a folder, bucket, archive or list of images: plan, caption each shard, merge.

    <output>/<model>-<key>/plan.json            model and shards; key: images, weights, options
                           listing-….parquet    the images of each shard, a row group each
                           captions/*.parquet   one file a shard, written whole or not at all
                           captions.csv …       the same in other formats, if asked for
                           summary.json         counts a status and reason
                           report.html          the same for people, with images
             latest.json                        the last summary

Every listed image has exactly one row, with a status. A second run captions only images that are
new or changed, or that could not be read but may be now; rows of images that are no longer listed
are removed. Other images, another model, other weights or other options have a folder of their own.
A shard's file is named after the images in it: a file of that name is always the finished shard.
"""
