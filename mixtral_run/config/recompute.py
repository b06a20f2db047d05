"""Settings of what the backward pass recomputes. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_run.config.fields import MEMORY, Config, setting

RECOMPUTE = ("none", "selective", "except-attention", "full", "offload")
"""Parts of a layer that the backward pass recomputes, from least to most. offload recomputes as much as full, and keeps
the inputs of the layers in host memory."""

RUNS_AGAIN = ("full", "except-attention", "offload")
"""The values of RECOMPUTE that run a layer again. The first is the default where one of them is needed."""


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig(Config):
    """Activations that the backward pass recomputes, and in how many layers."""

    recompute: str | None = setting(
        None,
        help="Activations that the backward pass recomputes. selective: those of norms, SwiGLU and permutation. full: "
        "the layer runs again. except-attention: the layer runs again except attention, whose results are kept. "
        "offload: as full, with the inputs of the layers in host memory. Default: on GPUs, for LoRA and AdamW, the "
        "least that fits by the plan, else none.",
        choices=RECOMPUTE,
        section=MEMORY,
    )
    recompute_layers: int | None = setting(
        None,
        help="Number of layers, from the first, that run again. Those after them recompute as with --recompute "
        "selective, which is faster and takes more memory. Needs --recompute full, except-attention or offload. "
        "Default: all, or what the planner chooses without --recompute.",
        minimum=1,
        section=MEMORY,
    )
    recompute_activations: bool = setting(False, help="The same as --recompute full.", section=MEMORY)

    @property
    def recomputation(self) -> str:
        """One of RECOMPUTE; none if neither setting was given."""
        return "full" if self.recompute_activations else self.recompute or "none"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.recompute_activations and self.recompute not in (None, "full"):
            found.append(f"--recompute-activations: the same as --recompute full; found --recompute {self.recompute}")
        if self.recompute_layers is not None and self.recomputation not in RUNS_AGAIN:
            found.append(
                "--recompute-layers: expected --recompute full, except-attention or offload with it, which run layers "
                f"again; found {f'--recompute {self.recompute}' if self.recompute else 'no --recompute'}"
            )
        return found
