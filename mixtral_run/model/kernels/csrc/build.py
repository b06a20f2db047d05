"""Compile product.cu with NVRTC, which comes with torch. No GPU is needed."""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from cuda.bindings import nvrtc

from mixtral_run.model.kernels.cache import cache_folder

CSRC = Path(__file__).parent
PARTS = ("product_machine.cuh", "product_plan.cuh")
SOURCES = ("product_registers.cuh", "product.cu")
WGMMA = "wgmma.mma_async.sync.aligned."
OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17")


def source_of(bits: int, csrc: Path = CSRC) -> str:
    """Return product.cu with all that belongs before it. csrc: that of another commit, to compare with."""
    kinds = (_multiply_add,) if bits == 16 else (_multiply_add_8_bits, _multiply_add_registers, _multiply_add_adapter)
    instructions = (kind(tokens) for kind in kinds for tokens in range(8, 257, 8))
    parts, sources = ([(csrc / name).read_text() for name in names] for names in (PARTS, SOURCES))
    return "\n".join((f"constexpr int BITS = {bits};", *parts, *instructions, *sources))


def compiled(bits: int, csrc: Path = CSRC) -> bytes:
    """Return product.cu for numbers of 16 or 8 bits as machine code, from the cache or compiled and cached."""
    source = source_of(bits, csrc)
    version = checked(nvrtc.nvrtcVersion())
    digest = hashlib.sha256(repr((source, OPTIONS, version)).encode()).hexdigest()
    cached = cache_folder() / f"product-{bits}-{digest}.cubin"
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
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), SOURCES[-1].encode(), 0, [], []))
    options = [option.encode() for option in OPTIONS]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytes(checked(nvrtc.nvrtcGetProgramLogSize(program)))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{SOURCES[-1]} does not compile: {log.decode(errors='replace').strip()}")
    code = bytes(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def _multiply_add(tokens: int) -> str:
    """Return the instruction for this number of tokens and 64 features: it adds 16 products of the sum, read from
    shared memory, to a thread's registers.
    """
    first, results = _of_result(tokens)
    return (
        "template <bool TRANSPOSED> __device__ __forceinline__ void multiply_add("
        f"float (&d)[{first}], u64 left, u64 right) {{\n"
        f'  asm volatile("{WGMMA}m64n{tokens}k16.f32.bf16.bf16 {{{_registers(0, first)}}}, %{first}, %{first + 1}, '
        f'1, 1, 1, %{first + 2}, 0;"\n      : {results} : "l"(left), "l"(right), "n"(TRANSPOSED ? 0 : 1));\n}}\n'
    )


def _multiply_add_8_bits(tokens: int) -> str:
    """Return the same for 32 products in 8 bit, both operands contiguous along the sum."""
    first, results = _of_result(tokens)
    return (
        "template <bool TRANSPOSED> __device__ __forceinline__ void multiply_add("
        f"float (&d)[{first}], u64 left, u64 right) {{\n"
        f'  asm volatile("{WGMMA}m64n{tokens}k32.f32.e4m3.e4m3 {{{_registers(0, first)}}}, %{first}, %{first + 1}, '
        f'1, 1, 1;"\n      : {results} : "l"(left), "l"(right));\n}}\n'
    )


def _multiply_add_registers(tokens: int) -> str:
    """Return the same with the weights from registers."""
    return _from_registers("multiply_add_registers", f"m64n{tokens}k32.f32.e4m3.e4m3", tokens, "1, 1, 1")


def _multiply_add_adapter(tokens: int) -> str:
    """Return the instruction for 16 products in 16 bit with the adapter's matrix from registers."""
    return _from_registers("multiply_add_adapter", f"m64n{tokens}k16.f32.bf16.bf16", tokens, "1, 1, 1, 0")


def _from_registers(name: str, shape: str, tokens: int, options: str) -> str:
    first, results = _of_result(tokens)
    words = ", ".join(f'"r"(left[{each}])' for each in range(4))
    return (
        f"__device__ __forceinline__ void {name}(float (&d)[{first}], const u32 (&left)[4], u64 right) {{\n"
        f'  asm volatile("{WGMMA}{shape} {{{_registers(0, first)}}}, {{{_registers(first, first + 4)}}}, %{first + 4}, '
        f'{options};"\n      : {results} : {words}, "l"(right));\n}}\n'
    )


def _of_result(tokens: int) -> tuple[int, str]:
    """Return how many registers of a thread hold the result, and its operands of the instruction."""
    count = tokens // 2
    return count, ", ".join(f'"+f"(d[{each}])' for each in range(count))


def _registers(begin: int, end: int) -> str:
    return ", ".join(f"%{each}" for each in range(begin, end))


def checked(result: tuple[Any, ...]) -> Any:
    """Return the results of a call of the driver or of NVRTC. Raises RuntimeError if its status is an error."""
    status, *rest = result
    if int(status) != 0:
        raise RuntimeError(f"{type(status).__name__}: {status.name}")
    return rest[0] if len(rest) == 1 else tuple(rest)
