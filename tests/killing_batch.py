"""Runs `captioner batch` with its options, and says "begins" once everything is imported: from there it is killed."""

import sys

import torch

import model_lib.captioning
import model_lib.merging  # noqa: F401
from model_lib.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    print("begins", flush=True)
    main(["batch", *sys.argv[1:]])
