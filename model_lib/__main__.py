"""`python -m model_lib` is `captioner`."""

from model_lib.exits import exit_in_one_line


def main() -> None:
    with exit_in_one_line():  # a package may be missing
        from model_lib.cli import main as run

    run()


if __name__ == "__main__":
    main()
