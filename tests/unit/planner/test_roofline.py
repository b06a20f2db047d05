"""The floors that benchmarks/roofline.py compares kernels with, beside numbers worked out by hand."""

import pytest

from benchmarks.roofline import Step, part_of


def test_floors_are_the_larger_of_operations_and_bytes() -> None:
    """One layer: 2 experts a token, 3 matrices of 4,096 x 14,336, forward and gradient, 2 operations a number."""
    operations = 2048 * 2 * 3 * 4096 * 14336 * 2 * 2
    many = Step(1, 2048, "bf16").floors(1e15, 1e30)
    assert many["experts' products"] == pytest.approx(1e3 * operations / 1e15)
    assert Step(1, 2048, "fp8").floors(1e15, 1e30)["experts' products"] == pytest.approx(1e3 * operations / 2e15)
    weights = 2 * 8 * 3 * 4096 * 14336
    few = Step(32, 1, "bf16").floors(1e30, 1e12)["experts' products"]
    assert few == pytest.approx(32 * 1e3 * 2 * weights / 1e12, rel=1e-3)
    assert Step(1, 1, "nf4").floors(1e30, 1e12)["quantization of rows"] == 0


def test_attention_in_8_bit_is_multiplied_at_twice_the_rate_from_half_the_bytes() -> None:
    """One layer of 4,096 x (6,144 + 4,096) and a head of 4,096 x 32,000, forward and gradient, at 2,048 tokens."""
    step, whole = Step(1, 2048, "bf16", attention="fp8"), Step(1, 2048, "bf16")
    operations = 4 * 2048 * 4096 * (6144 + 4096 + 32000)
    assert step.floors(1e15, 1e30)["dense products"] == pytest.approx(1e3 * operations / 2e15)
    assert whole.floors(1e15, 1e30)["dense products"] == pytest.approx(1e3 * operations / 1e15)
    few = Step(1, 1, "bf16", attention="fp8").floors(1e30, 1e12)
    assert few["dense products"] == pytest.approx(1e3 * 2 * 4096 * (6144 + 4096 + 32000) / 1e12, rel=1e-3)
    # Inputs of both projections and of the head, and the gradients of their outputs.
    numbers = 2048 * (4096 + 4096 + 4096 + 6144 + 4096 + 32000)
    assert step.floors(1e30, 1e12)["quantization of rows"] == pytest.approx(1e3 * 3 * numbers / 1e12)


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("transposed", "experts' products"),
        ("_grouped_product_kernel", "experts' products"),
        ("_narrow_product_kernel", "adapters of the experts"),
        ("_swiglu_backward_kernel", "SwiGLU"),
        ("_over_blocks_kernel", "SwiGLU"),
        ("_quantize_with_kernel", "quantization of rows"),
        ("_choose_backward_kernel", "router"),
        ("_cross_entropy_kernel", "loss"),
        ("_add_norm_kernel", "norms"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "dense products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("void at::native::vectorized_layer_norm_kernel<float>", "norms"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_parts_by_their_names(kernel: str, part: str) -> None:
    assert part_of(kernel) == part
