// Grouped products for Hopper in 16 or 8 bit. hopper_grouped_mm.py describes the computation and its layout, and prepends
// BITS, product_machine.cuh, product_plan.cuh and the instructions of every width, multiply_add.

constexpr int STAGES = 4;
constexpr int LEFT_BYTES = FEATURES * ROW_BYTES;
constexpr int RIGHT_BYTES = MOST_ATOMS * ATOM * ROW_BYTES;
constexpr int STAGED_TOKENS = 64;                       // tokens of a result that are staged at a time
constexpr int STAGED_BYTES = STAGED_TOKENS * FEATURES;  // of a group, which computes half of the features
constexpr int VALUES = MOST_ATOMS * ATOM * 64 / 128;  // of a tile, in the registers of one thread

// Addresses in shared memory: slices of both operands, staged results, scales of tokens, barriers, the plan.
struct Memory {
  u32 left, right, staged, scales, full, free;
  Plan* plan;
};

struct Ring {
  int slot = 0;
  u32 parity = 0;
  __device__ __forceinline__ void step() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
};

// ---- loading ----

// The part of every slice that a thread loads. In 16 bit three threads of different warps have one each: one alone takes about
// as long to load a slice as the other groups to multiply it. In 8 bit they gained nothing, and one thread loads everything.
enum Part { EVERYTHING, WEIGHTS, LARGE_BOXES, SMALL_BOXES };
constexpr int LOADERS = EIGHT ? 1 : 3;

// Loads rows in boxes of 64 and smaller ones, or only those of the given part.
template <Part PART>
__device__ __forceinline__ void bring_rows(const Operands& from, u32 to, u32 barrier, int column, int row, int count) {
  if constexpr (PART == EVERYTHING) {
    while (count >= 64) {
      bring_to_both(&from.right[0], to, barrier, column, row);
      count -= 64, row += 64, to += 64 * ROW_BYTES;
    }
  } else if constexpr (PART == LARGE_BOXES) {
    static_assert(MOST_ATOMS * ATOM / 2 == 128, "two boxes of 64 at most");
    if (count >= 64) bring_to_both(&from.right[0], to, barrier, column, row);
    if (count >= 128) bring_to_both(&from.right[0], to + 64 * ROW_BYTES, barrier, column, row + 64);
  } else {
    row += count & ~63, to += (count & ~63) * ROW_BYTES;
  }
  if constexpr (PART != LARGE_BOXES) {
#pragma unroll
    for (int size = 32, each = 1; size >= 8; size /= 2, ++each) {
      if (count & size) {
        bring_to_both(&from.right[each], to, barrier, column, row);
        row += size, to += size * ROW_BYTES;
      }
    }
  }
}

template <bool TRANSPOSED, Part PART>
__device__ __forceinline__ void bring_all(const Parameters& p, const Memory& memory, Work work, u32 program) {
  Ring ring;
  while (work.next(*memory.plan)) {
    const Tile& tile = work.tile;
    const int first = tile.atoms * program / 2 * ATOM, behind = tile.atoms * (program + 1) / 2 * ATOM;
    const int feature = (tile.column * 2 + program) * FEATURES;
    for (int slice = work.begin; slice < work.end; ++slice, ring.step()) {
      wait_for(memory.free + ring.slot * 8, ring.parity ^ 1);
      const u32 barrier = memory.full + ring.slot * 8, left = memory.left + ring.slot * LEFT_BYTES;
      const bool last = slice == p.steps;
      const Operands& from = last ? p.adapter : p.base;
      const int depth = last ? 0 : slice * DEPTH, in_all = last ? p.rank : p.steps * DEPTH;
      if constexpr (PART == EVERYTHING || PART == WEIGHTS) {
        // Of an 8-bit product's adapter the matrix is read by the threads that multiply.
        const bool both = !EIGHT || !last;
        // The bytes of all parts and of both programs.
        expect(barrier, (both ? LEFT_BYTES : 0) + tile.atoms * ATOM * ROW_BYTES);
        if (TRANSPOSED) {
          bring(&from.left, left, barrier, depth, tile.expert * p.wide * 2 * FEATURES + feature);
        } else if (both) {
          bring(&from.left, left, barrier, feature, tile.expert * in_all + depth);
          if (!EIGHT) bring(&from.left, left + LEFT_BYTES / 2, barrier, feature + 64, tile.expert * in_all + depth);
        }
      } else {
        expect(barrier, 0);
      }
      if constexpr (PART != WEIGHTS) {
        const u32 right = memory.right + ring.slot * RIGHT_BYTES + first * ROW_BYTES;
        bring_rows<PART>(from, right, barrier, depth, tile.row + first, behind - first);
      }
    }
  }
}

// ---- multiplying ----

__device__ __forceinline__ u32 as_pair(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Writes COUNT atoms of a group's result to shared memory, four values each, as bf16: [tokens, 64 features]. A warp has 16
// features of every token.
template <int COUNT>
__device__ __forceinline__ void stage(const float* values, u32 staged) {
  const int warp = (threadIdx.x & 127) / 32, lane = threadIdx.x & 31;
#pragma unroll
  for (int atom = 0; atom < COUNT; atom += 2) {
    const float* own = values + atom * 4;
    const int at = atom * ATOM + (atom + 1 < COUNT ? lane / 16 * 8 : 0) + (lane & 7);
    const u32 to = staged + at * 128 + (((warp * 2 + (lane / 8 & 1)) ^ (at & 7)) * 16);
    const u32 first = as_pair(own[0], own[1]), second = as_pair(own[2], own[3]);
    if (atom + 1 < COUNT) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(first),
                   "r"(second), "r"(as_pair(own[4], own[5])), "r"(as_pair(own[6], own[7]))
                   : "memory");
    } else {
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second)
                   : "memory");
    }
  }
}

// The same where rows m and m + 8 of a warp's result are neighboring features (product_registers.cuh).
template <int COUNT>
__device__ __forceinline__ void stage_interleaved(const float* values, u32 staged) {
  const int warp = (threadIdx.x & 127) / 32, lane = threadIdx.x & 31, row = lane / 4;
#pragma unroll
  for (int atom = 0; atom < COUNT; ++atom) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = atom * ATOM + (lane & 3) * 2 + i;
      const u32 to = staged + at * 128 + ((warp * 2 + row / 4) ^ (at & 7)) * 16 + (row & 3) * 4;
      const u32 both = as_pair(values[atom * 4 + i], values[atom * 4 + 2 + i]);
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(both) : "memory");
    }
  }
}

// Stores COUNT atoms of a group's result.
template <int COUNT, bool INTERLEAVED>
__device__ __forceinline__ void store(const float* values, const Parameters& p, u32 staged, int group, u32 program,
                                      const Tile& tile, int token) {
  const int thread = threadIdx.x & 127;
  group_meets(group);
  if constexpr (INTERLEAVED) stage_interleaved<COUNT>(values, staged);
  else stage<COUNT>(values, staged);
  group_meets(group);
  const int chunk = thread & 7;
  const u64 width = (u64)p.wide * 2 * FEATURES;
  u16* to = p.output + (tile.column * 2 + program) * FEATURES + group * 64 + chunk * 8;
#pragma unroll
  for (int atom = 0; atom < COUNT; atom += 2) {
    const int at = atom * ATOM + thread / 8, row = tile.row + token + at;
    if (row < tile.last && at < COUNT * ATOM) {
      u32 a, b, c, d;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                   : "r"(staged + at * 128 + ((chunk ^ (at & 7)) * 16)));
      *reinterpret_cast<uint4*>(to + row * width) = make_uint4(a, b, c, d);
    }
  }
}

// The sum of COUNT atoms of all pieces of a tile, always in the same order.
template <int COUNT, bool INTERLEAVED>
__device__ __forceinline__ void add_atoms(const Parameters& p, u32 staged, const Work& work, int group, u32 program,
                                          int atom) {
  float sum[COUNT * 4] = {};
  for (int part = 0; part < work.pieces; ++part) {
    const float4* from = p.parts + ((work.place_of(part) * 2 + program) * GROUPS + group) * (VALUES / 4) * 128 +
                         atom * 128 + (threadIdx.x & 127);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float4 values = __ldcg(from + i * 128);
      sum[4 * i] += values.x, sum[4 * i + 1] += values.y, sum[4 * i + 2] += values.z, sum[4 * i + 3] += values.w;
    }
  }
  store<COUNT, INTERLEAVED>(sum, p, staged, group, program, work.tile, atom * ATOM);
}

// Adds up the pieces of a tile if this one is the last to be done.
template <bool INTERLEAVED>
__device__ __forceinline__ void add_up(const Parameters& p, const Memory& memory, const Work& work, int group, u32 program) {
  int* was = memory.plan->was + group;
  __threadfence();
  group_meets(group);
  if ((threadIdx.x & 127) == 0) {
    int* counter = p.counters + (work.left * 2 + program) * GROUPS + group;
    *was = atomicAdd(counter, 1);
    if (*was == work.pieces - 1) *counter = 0;
  }
  group_meets(group);
  if (*was != work.pieces - 1) return;
  __threadfence();
  const u32 staged = memory.staged + group * STAGED_BYTES;
  int atom = 0;
  for (; atom + 4 <= work.tile.atoms; atom += 4) add_atoms<4, INTERLEAVED>(p, staged, work, group, program, atom);
  for (; atom < work.tile.atoms; ++atom) add_atoms<1, INTERLEAVED>(p, staged, work, group, program, atom);
}

// Waits until the products of a slice are done and hands it back to both programs.
__device__ __forceinline__ void finish(const Memory& memory, const Ring& ring) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  const int lane = threadIdx.x & 31;
  if (lane < 2) arrive_at(memory.free + ring.slot * 8, lane);
}

template <bool TRANSPOSED, int ATOMS>
__device__ __forceinline__ void multiply(const Parameters& p, const Memory& memory, const Work& work, Ring& ring,
                                         int group, u32 program) {
  constexpr int N = ATOMS * ATOM;
  constexpr bool IN_REGISTERS = EIGHT && !TRANSPOSED;
  float result[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) result[i] = 0;
  Epilogue<TRANSPOSED> epilogue(p, work.tile, group, program);
  int slice = work.begin;
  for (const int behind = EIGHT ? min(work.end, p.steps) : work.end; slice < behind; ++slice, ring.step()) {
    wait_for(memory.full + ring.slot * 8, ring.parity);
    const u32 start = memory.left + ring.slot * LEFT_BYTES;
    const u64 right = operand<1>(memory.right + ring.slot * RIGHT_BYTES);
    if constexpr (IN_REGISTERS) {
      u32 left[ROW_BYTES / 32][4];
      read_transposed(left, start, group);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < ROW_BYTES / 32; ++k) multiply_add_registers(result, left[k], right + k * (32 >> 4));
      finish(memory, ring);
    } else {
      const u64 left = operand<(TRANSPOSED ? 1 : 1024 >> 4)>(start + group * (LEFT_BYTES / 2));
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < ROW_BYTES / 32; ++k)
        multiply_add<TRANSPOSED>(result, left + k * (TRANSPOSED ? 32 >> 4 : 2048 >> 4), right + k * (32 >> 4));
      finish(memory, ring);
    }
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(result[i])::"memory");
  epilogue.template scale<ATOMS>(result, memory.scales, group);
  if constexpr (IN_REGISTERS) {
    // All threads agree, which the compiler must see: products in a branch that it takes for divergent run one by one.
    if (__any_sync(~0u, slice < work.end)) {
      wait_for(memory.full + ring.slot * 8, ring.parity);
      epilogue.add_adapter(result, operand<1>(memory.right + ring.slot * RIGHT_BYTES));
      finish(memory, ring);
      ring.step();
#pragma unroll
      for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(result[i])::"memory");
    }
  }
  if (!work.is_piece()) {
    const u32 staged = memory.staged + group * STAGED_BYTES;
    constexpr int AT_ONCE = STAGED_TOKENS / ATOM;
#pragma unroll
    for (int atom = 0; atom < ATOMS; atom += AT_ONCE) {
      if constexpr (ATOMS % AT_ONCE == 0) {
        store<AT_ONCE, IN_REGISTERS>(result + atom * 4, p, staged, group, program, work.tile, atom * ATOM);
      } else {
        if (atom + AT_ONCE <= ATOMS)
          store<AT_ONCE, IN_REGISTERS>(result + atom * 4, p, staged, group, program, work.tile, atom * ATOM);
        else
          store<ATOMS % AT_ONCE, IN_REGISTERS>(result + atom * 4, p, staged, group, program, work.tile, atom * ATOM);
      }
    }
  } else {
    float4* to = p.parts + ((work.place_of(work.part) * 2 + program) * GROUPS + group) * (VALUES / 4) * 128 +
                 (threadIdx.x & 127);
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
      to[i * 128] = make_float4(result[4 * i], result[4 * i + 1], result[4 * i + 2], result[4 * i + 3]);
  }
}

template <bool TRANSPOSED>
__device__ __forceinline__ void multiply_all(const Parameters& p, const Memory& memory, Work work, int group, u32 program) {
  Ring ring;
  while (work.next(*memory.plan)) {
    switch (work.tile.atoms) {
#define CASE(n) \
  case n: multiply<TRANSPOSED, n>(p, memory, work, ring, group, program); break;
      CASE(2) CASE(4) CASE(6) CASE(8) CASE(10) CASE(12) CASE(14) CASE(16)
      CASE(18) CASE(20) CASE(22) CASE(24) CASE(26) CASE(28) CASE(30) CASE(32)
#undef CASE
#define CASE(n) \
  case n: if constexpr (UNIT == 1) multiply<TRANSPOSED, n>(p, memory, work, ring, group, program); break;
      CASE(17) CASE(19) CASE(21) CASE(23) CASE(25) CASE(27) CASE(29) CASE(31)
#undef CASE
    }
    if (work.is_piece()) add_up<EIGHT && !TRANSPOSED>(p, memory, work, group, program);
  }
}

template <bool TRANSPOSED>
__device__ __forceinline__ void grouped_product(const Parameters& p) {
  extern __shared__ char start[];
  const u32 base = (address_of(start) + 1023) & ~1023u;
  char* pointer = start + (base - address_of(start));
  Memory memory;
  memory.left = base;
  memory.right = memory.left + STAGES * LEFT_BYTES;
  memory.staged = memory.right + STAGES * RIGHT_BYTES;
  memory.scales = memory.staged + GROUPS * STAGED_BYTES;
  memory.full = memory.scales + GROUPS * MOST_ATOMS * ATOM * 4;
  memory.free = memory.full + STAGES * 8;
  memory.plan = reinterpret_cast<Plan*>(pointer + (memory.free + STAGES * 8 - base));
  u32 program;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(program));
  if (threadIdx.x < 10) {
    // The tensor maps of the operands.
    const char* map = reinterpret_cast<const char*>(&p) + threadIdx.x * sizeof(Map);
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      // Every thread that loads arrives, so that none falls behind by a round of the ring.
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(memory.full + stage * 8), "n"(LOADERS) : "memory");
      // Every multiplying warp of both programs arrives.
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 16;" ::"r"(memory.free + stage * 8) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  plan_tiles(*memory.plan, p);
  const Work work(*memory.plan, p, blockIdx.x / 2, gridDim.x / 2);
  pair_meets();
  const int group = threadIdx.x / 128;
  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    constexpr int FIRST = GROUPS * 128;
    if constexpr (LOADERS == 1) {
      if (threadIdx.x == FIRST) bring_all<TRANSPOSED, EVERYTHING>(p, memory, work, program);
    } else {
      if (threadIdx.x == FIRST) bring_all<TRANSPOSED, WEIGHTS>(p, memory, work, program);
      else if (threadIdx.x == FIRST + 32) bring_all<TRANSPOSED, LARGE_BOXES>(p, memory, work, program);
      else if (threadIdx.x == FIRST + 64) bring_all<TRANSPOSED, SMALL_BOXES>(p, memory, work, program);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    multiply_all<TRANSPOSED>(p, memory, work, group, program);
  }
  // Neither program exits while the other may still write to its shared memory.
  pair_meets();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    transposed(const __grid_constant__ Parameters p) {
  grouped_product<true>(p);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    untransposed(const __grid_constant__ Parameters p) {
  grouped_product<false>(p);
}
