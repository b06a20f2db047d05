"""Grouped products in bf16 for Hopper, with an adapter's part in the same sum. Import only on machines with a GPU.

    output [tokens, n] = rows [tokens, k] · Wᵀ, W [experts, n, k]       forward
    output [tokens, n] = rows [tokens, k] · W,  W [experts, k, n]       gradient of the rows
    … + inner [tokens, r] · the adapter's second matrix of each expert

The numbers of rows are ragged. With tiles of 128 rows, as in libraries, an expert's last tile is half empty on average:
an eighth of all work at 500 rows an expert, where the GPU runs at its power limit. Here the weights are the first
operand of the instruction and the tokens the second, whose width may be any multiple of 8: an expert's rows are cut
into tiles of at most 256 rows whose sizes differ by at most 8. Less than 8 rows are wasted in all; less than 16 if an
expert has fewer than 128 rows.

Two programs (thread blocks, one a multiprocessor) form a pair, which is a cluster. They compute the same tokens and 128
features each; each loads half of the tokens' rows to the shared memory of both. In a program one thread loads slices of
64 along the sum to shared memory by TMA, and two groups of four warps multiply 64 features each by all tokens.

The number of tiles is rarely a multiple of the number of pairs. Whole tiles are assigned in rounds, sorted by size, so
that pairs that read the same weights and rows run at the same time and find them in the L2 cache. The remaining tiles
are split along the sum if that is faster; the program that finishes a tile last sums its pieces, in a fixed order.

The adapter's part is one more slice: TMA reads zeros beyond the r columns of `inner`, so that the other operand does
not matter there.

The kernel is CUDA C++ (csrc/product.cu), since neither Triton nor Gluon has instructions of such widths, or pairs that
share their loads. NVRTC, which comes with torch, compiles it; the binary is cached in Triton's cache folder. Concurrent
calls on several streams would mix their pieces; the model uses one stream.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor

from mixtral_run.model.kernels.cache import cache_folder

PARTS = ("product_machine.cuh", "product_plan.cuh")
SOURCE = "product.cu"
OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17")

# These constants equal those of csrc/product_plan.cuh.
FEATURES = 128
"""Features of a program's tile."""
DEPTH = 64
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
        ("experts", ctypes.c_int),
        ("wide", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("filling", ctypes.c_char * 16),
    )


def fits(experts: int, width: int, depth: int, rank: int) -> bool:
    """Return True if `grouped_product` takes so many experts, matrices of n = width and k = depth, and an adapter of
    this rank (0 for none).
    """
    return (
        experts <= MOST_EXPERTS
        and width % (PROGRAMS * FEATURES) == 0
        and depth % DEPTH == 0
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

    All are bf16 and contiguous, of sizes that `fits` accepts.
    """
    tokens, depth = rows.shape
    experts = matrices.shape[0]
    width = matrices.shape[1] if transposed else matrices.shape[2]
    output = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if tokens == 0:
        return output
    pairs = _pairs(rows.device)
    parts, counters = _workspace(rows.device)
    parameters = _Parameters(
        base=_operands(rows, matrices, transposed),
        adapter=_operands(*(adapter or (rows, matrices)), transposed),
        offsets=offsets.data_ptr(),
        output=output.data_ptr(),
        parts=parts.data_ptr(),
        counters=counters.data_ptr(),
        experts=experts,
        wide=width // (PROGRAMS * FEATURES),
        steps=depth // DEPTH,
        rank=adapter[0].shape[1] if adapter is not None else 0,
    )
    _launch(_kernels(rows.device)[transposed], pairs * PROGRAMS, parameters)
    return output


def _operands(rows: Tensor, matrices: Tensor, transposed: bool) -> _Operands:
    height = matrices.shape[0] * matrices.shape[1]
    left = _map(matrices.data_ptr(), height, matrices.shape[2], FEATURES if transposed else DEPTH)
    right = (_map(rows.data_ptr(), *rows.shape, box) for box in BOXES)
    return _Operands(left, (_Map * len(BOXES))(*right))


@functools.lru_cache(maxsize=4096)
def _map(address: int, height: int, width: int, box: int) -> _Map:
    """Return the tensor map by which TMA reads a bf16 matrix [height, width], `box` rows and 64 columns at a time.

    TMA reads zeros beyond the matrix.
    """
    made = _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            address,
            [driver.cuuint64_t(width), driver.cuuint64_t(height)],
            [driver.cuuint64_t(width * 2)],
            [driver.cuuint32_t(64), driver.cuuint32_t(box)],
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
    _checked(
        driver.cuLaunchKernel(
            kernel, programs, 1, 1, THREADS, 1, 1, SHARED_BYTES, stream, ctypes.addressof(pointers), 0
        )
    )


@functools.cache
def _pairs(device: torch.device) -> int:
    """Return how many pairs run at once on the device."""
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = PROGRAMS * MOST_PAIRS, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = THREADS, 1, 1
    config.sharedMemBytes = SHARED_BYTES
    pair = driver.CUlaunchAttribute()
    pair.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    pair.value.clusterDim.x, pair.value.clusterDim.y, pair.value.clusterDim.z = PROGRAMS, 1, 1
    config.attrs, config.numAttrs = [pair], 1
    found = [_checked(driver.cuOccupancyMaxActiveClusters(kernel, config)) for kernel in _kernels(device)]
    return int(min(*found, MOST_PAIRS))


@functools.cache
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return memory for pieces of tiles, and counters of the finished pieces, which are zero before and after each
    call.

    They are allocated once: allocated with every call they would fragment the allocator's blocks.
    """
    parts = torch.empty(_pairs(device) * PIECES_PER_PAIR * PIECE_VALUES, dtype=torch.float32, device=device)
    return parts, torch.zeros(MOST_PAIRS * PROGRAMS * GROUPS, dtype=torch.int32, device=device)


@functools.cache
def _kernels(device: torch.device) -> tuple[Any, Any]:
    """Return the device's kernels for untransposed and for transposed matrices."""
    with torch.cuda.device(device):
        # torch creates the device's context with its first operation there.
        torch.cuda.current_stream().synchronize()
        module = _checked(driver.cuModuleLoadData(compiled()))
        kernels = [_checked(driver.cuModuleGetFunction(module, name)) for name in (b"untransposed", b"transposed")]
        for kernel in kernels:
            what = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(kernel, what, SHARED_BYTES))
    return kernels[0], kernels[1]


def compiled() -> bytes:
    """Return product.cu as machine code, from the cache or compiled and cached."""
    csrc = Path(__file__).parent / "csrc"
    instructions = map(_multiply_add, range(8, 257, 8))
    source = "\n".join((*((csrc / part).read_text() for part in PARTS), *instructions, (csrc / SOURCE).read_text()))
    version = _checked(nvrtc.nvrtcVersion())
    digest = hashlib.sha256(repr((source, OPTIONS, version)).encode()).hexdigest()
    cached = cache_folder() / f"product-{digest}.cubin"
    try:
        return cached.read_bytes()
    except OSError:
        code = _compile(source)
    # If it cannot be cached it is compiled again next time. The temporary name is unique even between containers, whose
    # processes may have the same numbers.
    with suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            made = Path(folder) / cached.name
            made.write_bytes(code)
            made.replace(cached)
    return code


def _compile(source: str) -> bytes:
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), SOURCE.encode(), 0, [], []))
    options = [option.encode() for option in OPTIONS]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{SOURCE} does not compile: {log.decode(errors='replace').strip()}")
    code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def _multiply_add(tokens: int) -> str:
    """Return the instruction for this number of tokens and 64 features: it adds 16 products of the sum, read from
    shared memory, to a thread's registers.
    """
    count = tokens // 2
    registers = ", ".join(f"%{each}" for each in range(count))
    results = ", ".join(f'"+f"(d[{each}])' for each in range(count))
    name = f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.bf16.bf16"
    operands = f"%{count}, %{count + 1}, 1, 1, 1, %{count + 2}, 0"
    return (
        "template <bool TRANSPOSED> __device__ __forceinline__ void multiply_add("
        f"float (&d)[{count}], unsigned long long left, unsigned long long right) {{\n"
        f'  asm volatile("{name} {{{registers}}}, {operands};"\n'
        f'      : {results} : "l"(left), "l"(right), "n"(TRANSPOSED ? 0 : 1));\n}}\n'
    )


def _checked(result: tuple[Any, ...]) -> Any:
    """Return the results of a call of the driver or of NVRTC. Raises RuntimeError if its status is an error."""
    status, *rest = result
    if int(status) != 0:
        raise RuntimeError(f"{type(status).__name__}: {status.name}")
    return rest[0] if len(rest) == 1 else tuple(rest)
