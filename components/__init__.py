"""The pipeline's stages as KFP components: definitions only, the work is in `model_lib`."""

from model_lib import __version__

IMAGE = f"captioner:{__version__}"
"""The container image of every stage; it holds `kfp` and `model_lib`."""
