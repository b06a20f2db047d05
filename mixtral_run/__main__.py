"""`python -m mixtral_run VERB`, and `torchrun … -m mixtral_run VERB`."""

from mixtral_run.cli import main

if __name__ == "__main__":
    main()
