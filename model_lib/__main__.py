"""`python -m model_lib` is `captioner`."""

from model_lib.cli import main

if __name__ == "__main__":
    main()
