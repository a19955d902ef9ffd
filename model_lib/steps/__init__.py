"""Parts of a pipeline's steps that no other command has: preflight, candidates, outcome, closing.

Nothing here imports kfp.
"""
