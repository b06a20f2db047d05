"""HF transformers with PEFT: adapters on all linear layers and experts, grouped_mm, fused attention."""

from __future__ import annotations

import argparse

from benchmarks.rivals.harness import ALPHA, ATTENTION, EXPERT_PARAMETERS, RANK, Ready, mixtral_config, random_model


def prepare(layers: int, seq: int, arguments: argparse.Namespace) -> Ready:
    """Build the model as its users do; `seq` makes no difference."""
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralForCausalLM

    config = mixtral_config(layers)
    config._experts_implementation = "grouped_mm"
    model = random_model(MixtralForCausalLM, config, attn_implementation="sdpa")
    if arguments.rival_checkpointing == "own":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    settings = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(ATTENTION),
        target_parameters=[] if arguments.attention_only else list(EXPERT_PARAMETERS),
    )
    model = get_peft_model(model, settings).train()

    def proof() -> str:
        if (found := model.config._experts_implementation) != "grouped_mm":
            raise RuntimeError(f"the experts run as {found}, not grouped_mm")
        return "transformers grouped_mm"

    return Ready(model, proof)
