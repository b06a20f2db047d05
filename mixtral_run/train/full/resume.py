"""Continue a run of full fine-tuning from its newest checkpoint, in any layout."""

from __future__ import annotations

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.train.checkpoints.resume_checks import check_full_resume
from mixtral_run.train.full.saving import load_states
from mixtral_run.train.full.sharded_adamw import ShardedAdamW
from mixtral_run.train.run import Run
from mixtral_run.train.run_checkpoints import continue_run, loss_warning
from mixtral_run.weights.manifest.describe import BaseDescription


def resume_full(run: Run, optimizer: ShardedAdamW, config: PretrainConfig, base: BaseDescription) -> int:
    """Load the optimizer's state and that of the run. Return the iteration. All ranks must call.

    The model has the weights of the checkpoint already. base: that the run began with.
    """
    trained = check_full_resume(config, base)
    load_states(run.model, optimizer, trained)
    # Nothing draws random numbers: there is no dropout.
    continue_run(run, config, trained)
    if other_loss := loss_warning(config, trained):
        run.report.warn(other_loss)
    return trained.iteration
