"""`python -m mixtral_run VERB`, `torchrun … -m mixtral_run VERB`, and the program `mixtral-run`."""

from mixtral_run.launch.imports import importing


def main() -> None:
    """Run the command line, see cli/main.py."""
    with importing():
        from mixtral_run.cli.main import main as run
    run()


if __name__ == "__main__":
    main()
