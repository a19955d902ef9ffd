"""Files, networks and what they hold: storage, caches, images, locks, retries.

Nothing of captioning may come in: these modules import only each other and `model_lib.errors`.
"""
