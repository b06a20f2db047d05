"""Grouped products in 16 and 8 bit for Hopper, with an adapter's part in the same sum. Import only on machines with a
GPU.

    output [tokens, n] = rows [tokens, k] · Wᵀ, W [experts, n, k]       forward
    output [tokens, n] = rows [tokens, k] · W,  W [experts, k, n]       gradient of the rows
    … + inner [tokens, r] · the adapter's second matrix of each expert

The numbers of rows are ragged. With tiles of 128 rows, as in libraries, an expert's last tile is half empty on average:
an eighth of all work at 500 rows an expert, where the GPU runs at its power limit. Here the weights are the first
operand of the instruction and the tokens the second, whose width may be any multiple of 8: an expert's rows are cut
into tiles of at most 256 rows whose sizes differ by at most 8. Less than 8 rows are wasted in all; less than 16 if an
expert has fewer than 128 rows.

Two programs (thread blocks, one a multiprocessor) form a pair, which is a cluster. They compute the same tokens and 128
features each; each loads half of the tokens' rows to the shared memory of both. In a program three threads load slices
of 64 along the sum to shared memory by TMA (one the weights, two the rows; in 8 bit one thread loads both), and two
groups of four warps multiply 64 features each by all tokens.

The number of tiles is rarely a multiple of the number of pairs. Whole tiles are assigned in rounds, sorted by size, so
that pairs that read the same weights and rows run at the same time and find them in the L2 cache. The remaining tiles
are split along the sum if that is faster; the program that finishes a tile last sums its pieces, in a fixed order.

The adapter's part is one more slice: TMA reads zeros beyond the r columns of `inner`, so that the other operand does
not matter there.

In 8 bit (float8 e4m3) a slice is 128 long, and sums are multiplied by the scales of tokens and features before they
are stored. Hopper multiplies 8-bit operands only if they are contiguous along the sum. For the gradient the weights are
not: they go through registers, where they are transposed on their way (csrc/product_registers.cuh), each word once for
up to 256 tokens.

The kernel is CUDA C++ (csrc/product.cu), since Triton has no instructions of such widths, or pairs that
share their loads. NVRTC, which comes with torch, compiles it; the binary is cached in Triton's cache folder. Concurrent
calls on several streams would mix their pieces; the model uses one stream.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver
from torch import Tensor

from mixtral_run.model.kernels.csrc.build import CSRC, checked, compiled

# These constants equal those of csrc/product_plan.cuh.
FEATURES = 128
"""Features of a program's tile."""
ROW_BYTES = 128
"""Bytes of a row or a column in a slice along the sum."""
MOST_RANK = 64
MOST_EXPERTS = 64
MOST_PAIRS = 128
BOXES = (64, 32, 16, 8)
"""Numbers of rows that one TMA load can have."""
THREADS = 384
SHARED_BYTES = 227 * 1024
"""The maximum of a program: slices, staged results, barriers and the plan (product.cu)."""
PROGRAMS, GROUPS = 2, 2
"""Programs of a pair, and groups of warps of a program."""
PIECES_PER_PAIR = 4
"""Pieces of tiles for which a pair has memory."""
PIECE_VALUES = PROGRAMS * GROUPS * 128 * 128
"""Numbers of a tile's piece, fp32: 128 registers of each of a group's 128 threads, for all groups of a pair."""


class _Map(ctypes.Structure):
    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


class _Operands(ctypes.Structure):
    _fields_ = (("left", _Map), ("right", _Map * len(BOXES)))


class _Parameters(ctypes.Structure):
    """Arguments of the kernel; the layout is that of `Parameters` in csrc/product_plan.cuh."""

    _fields_ = (
        ("base", _Operands),
        ("adapter", _Operands),
        ("offsets", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("half", ctypes.c_void_p),
        ("experts", ctypes.c_int),
        ("wide", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("filling", ctypes.c_char * 56),
    )


def fits(experts: int, width: int, depth: int, rank: int, num_bytes: int = 2) -> bool:
    """Return True if `grouped_product`, or for numbers of one byte `scaled_product`, takes so many experts, matrices of
    n = width and k = depth, and an adapter of this rank (0 for none).
    """
    return (
        experts <= MOST_EXPERTS
        and width % (PROGRAMS * FEATURES) == 0
        and depth * num_bytes % ROW_BYTES == 0
        and rank % 8 == 0
        and rank <= MOST_RANK
    )


def grouped_product(
    rows: Tensor, matrices: Tensor, offsets: Tensor, adapter: tuple[Tensor, Tensor] | None = None, *, transposed: bool
) -> Tensor:
    """Return rows · matrices, plus the adapter's part if given: [tokens, n]. Sums are fp32.

    Args:
        rows: [tokens, k].
        matrices: [experts, k, n], or, if `transposed`, [experts, n, k].
        offsets: see grouped_mm.py.
        adapter: inner [tokens, r] and [experts, r, n], or, if `transposed`, [experts, n, r].

    All are bf16 and contiguous, of sizes that `fits` accepts, with one row at least.
    """
    experts = matrices.shape[0]
    width = matrices.shape[1] if transposed else matrices.shape[2]
    return _product(
        rows,
        experts,
        width,
        offsets,
        base=_operands(rows, matrices, transposed),
        adapter=_operands(*(adapter or (rows, matrices)), transposed),
        rank=adapter[0].shape[1] if adapter is not None else 0,
        transposed=transposed,
    )


def scaled_product(
    small: Tensor,
    matrices: Tensor,
    row_scales: Tensor,
    scales: Tensor | None,
    offsets: Tensor,
    adapter: tuple[Tensor, Tensor] | None = None,
    *,
    transposed: bool,
) -> Tensor:
    """Return small · matrices times both scales, plus the adapter's part if given: bf16 [tokens, n]. Sums are fp32.

    Args:
        small: float8 e4m3 [tokens, k].
        matrices: float8 e4m3 [experts, k, n], or, if `transposed`, [experts, n, k].
        row_scales: fp32 [tokens].
        scales: fp32 [experts, n], or None for ones; only if `transposed`.
        offsets: see grouped_mm.py.
        adapter: inner [tokens, r] and [experts, r, n], bf16; only if not `transposed`.

    All are contiguous, of sizes that `fits` accepts, with one row at least.
    """
    assert scales is None if not transposed else adapter is None
    experts, above, below = matrices.shape
    base = _operands(small, matrices, transposed)
    inner, half = adapter if adapter is not None else (None, None)
    return _product(
        small,
        experts,
        above if transposed else below,
        offsets,
        base=base,
        # All maps are prefetched, also those that are not read.
        adapter=_Operands(base.left, _boxes(inner) if inner is not None else base.right),
        rank=inner.shape[1] if inner is not None else 0,
        transposed=transposed,
        row_scales=row_scales.data_ptr(),
        scales=scales.data_ptr() if scales is not None else None,
        half=half.data_ptr() if half is not None else None,
    )


def _product(rows: Tensor, experts: int, width: int, offsets: Tensor, *, transposed: bool, **parameters: Any) -> Tensor:
    """Launch the kernel of the rows' dtype with these parameters and those of the machine."""
    tokens, depth = rows.shape
    output = torch.empty(tokens, width, dtype=torch.bfloat16, device=rows.device)
    bits = 8 * rows.element_size()
    pairs = _pairs(rows.device, bits)
    parts, counters = _workspace(rows.device, pairs)
    given = _Parameters(
        offsets=offsets.data_ptr(),
        output=output.data_ptr(),
        parts=parts.data_ptr(),
        counters=counters.data_ptr(),
        experts=experts,
        wide=width // (PROGRAMS * FEATURES),
        steps=depth * rows.element_size() // ROW_BYTES,
        **parameters,
    )
    _launch(_kernels(rows.device, bits)[transposed], pairs * PROGRAMS, given)
    return output


def _operands(rows: Tensor, matrices: Tensor, transposed: bool) -> _Operands:
    height = matrices.shape[0] * matrices.shape[1]
    box = FEATURES if transposed else ROW_BYTES // matrices.element_size()
    return _Operands(_map(matrices.data_ptr(), height, matrices.shape[2], box, matrices.element_size()), _boxes(rows))


def _boxes(rows: Tensor) -> Any:
    return (_Map * len(BOXES))(*(_map(rows.data_ptr(), *rows.shape, box, rows.element_size()) for box in BOXES))


@functools.lru_cache(maxsize=4096)
def _map(address: int, height: int, width: int, box: int, num_bytes: int) -> _Map:
    """Return the tensor map by which TMA reads a matrix [height, width] of bf16 or of bytes, `box` rows and 128 bytes
    of each at a time.

    TMA reads zeros beyond the matrix.
    """
    kinds = driver.CUtensorMapDataType
    made = checked(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if num_bytes == 2 else kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            address,
            [driver.cuuint64_t(width), driver.cuuint64_t(height)],
            [driver.cuuint64_t(width * num_bytes)],
            [driver.cuuint32_t(ROW_BYTES // num_bytes), driver.cuuint32_t(box)],
            [driver.cuuint32_t(1)] * 2,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return _Map.from_buffer_copy(ctypes.string_at(made.getPtr(), ctypes.sizeof(_Map)))


def _launch(kernel: Any, programs: int, parameters: _Parameters) -> None:
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
    stream = torch.cuda.current_stream().cuda_stream
    checked(
        driver.cuLaunchKernel(
            kernel, programs, 1, 1, THREADS, 1, 1, SHARED_BYTES, stream, ctypes.addressof(pointers), 0
        )
    )


@functools.cache
def _pairs(device: torch.device, bits: int) -> int:
    """Return how many pairs run at once on the device."""
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = PROGRAMS * MOST_PAIRS, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = THREADS, 1, 1
    config.sharedMemBytes = SHARED_BYTES
    pair = driver.CUlaunchAttribute()
    pair.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    pair.value.clusterDim.x, pair.value.clusterDim.y, pair.value.clusterDim.z = PROGRAMS, 1, 1
    config.attrs, config.numAttrs = [pair], 1
    found = [checked(driver.cuOccupancyMaxActiveClusters(kernel, config)) for kernel in _kernels(device, bits)]
    return int(min(*found, MOST_PAIRS))


@functools.cache
def _workspace(device: torch.device, pairs: int) -> tuple[Tensor, Tensor]:
    """Return memory for pieces of tiles, and counters of the finished pieces, which are zero before and after each
    call.

    They are allocated once: allocated with every call they would fragment the allocator's blocks.
    """
    parts = torch.empty(pairs * PIECES_PER_PAIR * PIECE_VALUES, dtype=torch.float32, device=device)
    return parts, torch.zeros(MOST_PAIRS * PROGRAMS * GROUPS, dtype=torch.int32, device=device)


@functools.cache
def _kernels(device: torch.device, bits: int) -> tuple[Any, Any]:
    """Return the device's kernels for untransposed and for transposed matrices, of numbers of 16 or 8 bits."""
    return loaded(device, bits, CSRC)


@functools.cache
def loaded(device: torch.device, bits: int, folder: Path) -> tuple[Any, Any]:
    """Return `_kernels` of the source in this folder."""
    with torch.cuda.device(device):
        # torch creates the device's context with its first operation there.
        torch.cuda.current_stream().synchronize()
        module = checked(driver.cuModuleLoadData(compiled(bits, folder)))
        kernels = [checked(driver.cuModuleGetFunction(module, name)) for name in (b"untransposed", b"transposed")]
        for kernel in kernels:
            what = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(kernel, what, SHARED_BYTES))
    return kernels[0], kernels[1]
