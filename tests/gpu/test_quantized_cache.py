"""Experts kept beside the base on a GPU: the same bytes as on a CPU, read back as they were quantized."""

from pathlib import Path

import pytest
import torch
from isal.isal_zlib import crc32

from mixtral_run.model.kernels.quantized.quantized_mm import KEPT_AS, quantize_to
from tests.support.quantized_cache import KEPT_NUMBERS, checksums_of, same, start, took, weight_to_keep, wipe_experts
from tests.support.tiny import write_tiny


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_numbers_are_those_of_a_cpu(precision: str) -> None:
    found = checksums_of(quantize_to(weight_to_keep().cuda(), precision))
    assert (KEPT_AS[precision], found) == KEPT_NUMBERS[precision]
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(512, 4096, generator=generator) * torch.logspace(-30, 30, 512)[:, None]
        weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
        weight = weight.to(dtype)
        for there, mesh in zip(quantize_to(weight.cuda(), precision), quantize_to(weight, precision), strict=True):
            assert torch.equal(there.cpu().view(torch.uint8), mesh.view(torch.uint8))


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_a_start_reads_what_it_would_quantize(tmp_path: Path, precision: str, stored: torch.dtype) -> None:
    base = tmp_path / "base"
    write_tiny(base, dtype=stored, hidden_size=256, intermediate_size=1024)
    dtype = "auto" if stored is torch.float16 else "bf16"
    quantized = start(base, "no", precision, dtype, device="cuda")
    made = start(base, "yes", precision, dtype, device="cuda")
    assert "Writing the quantized cache" in made.said
    assert same(made, quantized)
    files = [crc32(file.read_bytes()) for file in sorted((base / f"quantised-{precision}").glob("*.safetensors"))]
    assert len(files) == 2
    wipe_experts(base)
    again = start(base, "yes", precision, dtype, device="cuda")
    assert took(again)
    assert same(again, quantized)
    assert all(each.is_cuda for each in again.experts.values())
