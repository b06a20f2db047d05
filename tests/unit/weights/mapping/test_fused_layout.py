"""The fused layout of Transformers 5, written out.

gate_up_proj holds, expert by expert, the rows of the gate (w1), then those of up (w3). Transformers computes
`gate, up = linear(hidden, gate_up_proj[expert]).chunk(2)`.
"""

from pathlib import Path

import pytest
import torch

from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.hf.hf_weights import open_hf_weights
from mixtral_run.weights.mapping.hf_to_megatron import fused_place, fused_tensors
from tests.support.tiny import TINY_CONFIG, write_tiny

# 3 experts with 5 rows of 4 columns: w1, w3 and w2 have 20 elements each.
ARCHITECTURE = MixtralArchitecture.from_hf_config(
    TINY_CONFIG
    | {"hidden_size": 4, "intermediate_size": 5, "num_local_experts": 3, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 2},
    where="test",
)
PREFIX = "model.layers.1."


@pytest.mark.parametrize(
    ("name", "stored", "first"),
    [
        ("experts.0.w1", "experts.gate_up_proj", 0),
        ("experts.0.w3", "experts.gate_up_proj", 20),
        ("experts.1.w1", "experts.gate_up_proj", 40),
        ("experts.1.w3", "experts.gate_up_proj", 60),
        ("experts.2.w3", "experts.gate_up_proj", 100),
        ("experts.0.w2", "experts.down_proj", 0),
        ("experts.2.w2", "experts.down_proj", 40),
        ("gate", "gate.weight", 0),
    ],
)
def test_places(name: str, stored: str, first: int) -> None:
    released = f"{PREFIX}block_sparse_moe.{name}.weight"
    assert fused_place(ARCHITECTURE, released) == (f"{PREFIX}mlp.{stored}", first)


def test_shapes() -> None:
    of_layer = {name: shape for name, shape in fused_tensors(ARCHITECTURE).items() if name.startswith(PREFIX)}
    assert of_layer == {
        f"{PREFIX}mlp.gate.weight": (3, 4),
        f"{PREFIX}mlp.experts.gate_up_proj": (3, 10, 4),
        f"{PREFIX}mlp.experts.down_proj": (3, 4, 5),
    }


def test_a_fused_directory_is_read_as_transformers_wrote_it(tmp_path: Path) -> None:
    """Compare bytes of the file at the places that the reader names with the tensors before they were fused."""
    expected = write_tiny(tmp_path, fused=True, num_shards=1)
    sources = open_hf_weights(tmp_path).sources
    for name in ("experts.0.w1", "experts.0.w3", "experts.5.w1", "experts.5.w3", "experts.5.w2", "gate"):
        released = f"{PREFIX}block_sparse_moe.{name}.weight"
        source = sources[released]
        with source.file.open("rb") as file:
            file.seek(source.start)
            found = torch.frombuffer(bytearray(file.read(source.num_bytes)), dtype=torch.float32)
        assert torch.equal(found, expected[released].flatten()), name
