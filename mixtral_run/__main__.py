"""`python -m mixtral_run VERB`, and `torchrun … -m mixtral_run VERB`."""

from mixtral_run.cli.main import main

if __name__ == "__main__":
    main()
