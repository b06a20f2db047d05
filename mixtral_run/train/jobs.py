"""The jobs that load a model in several processes: the function of each, by name. Importing this module is cheap."""

from mixtral_run.launch.run_job import Job

PRELOAD = ("mixtral_run.train.loop",)
"""Imports of the fork server. They cover nearly everything that the jobs need."""

FINETUNE = Job("mixtral_run.train.loop:finetune", PRELOAD)
PRETRAIN = Job("mixtral_run.train.loop:pretrain", PRELOAD)
GENERATE = Job("mixtral_run.inference.generate:generate", PRELOAD)
CHAT = Job("mixtral_run.inference.chat:chat", PRELOAD)
EVALUATE = Job("mixtral_run.inference.evaluation.evaluate:evaluate", PRELOAD)
PROVE = Job("mixtral_run.inference.prove:prove", PRELOAD)
COMPARE_LOGITS = Job("mixtral_run.trial.logits_parity:compare_logits", PRELOAD)
