// Work in registers for the 8-bit products of product.cu: operands that are transposed, scales, the adapter's part.
//
// Hopper multiplies 8-bit numbers only if both operands are contiguous along the sum, which weights are not for the
// gradient. The weights' operand then comes from registers, where row m of a warp's 16 rows holds four numbers of the sum.
// ldmatrix transposes units of 16 bit, here two neighboring features, and a permutation of bytes parts them: feature 2m is
// row m, and feature 2m + 1 is row m + 8.

// The weights of a group for one slice: words of four numbers along the sum. `start`: [DEPTH along the sum, FEATURES].
__device__ __forceinline__ void read_transposed(u32 (&left)[ROW_BYTES / 32][4], u32 start, int group) {
  const int warp = (threadIdx.x & 127) / 32, lane = threadIdx.x & 31;
  // The two matrices of 8 rows that make up 16 numbers of the sum each have rows of all eight places in a swizzled block of
  // 1,024 bytes, so that no bank of shared memory is read twice.
  const int half = lane / 8 & 1, pair = (lane & 7) / 2;
  const int row = lane / 16 * 16 + pair * 4 + (lane & 1) + 2 * (half ^ (pair >= 2));
  const u32 from = start + row * ROW_BYTES + (((group * 4 + warp) ^ (row & 7)) * 16);
  const bool swapped = (lane & 3) >= 2;
  const u32 even = swapped ? 0x2064 : 0x6420, odd = swapped ? 0x3175 : 0x7531;
#pragma unroll
  for (int k = 0; k < ROW_BYTES / 32; ++k) {
    u32 a, b, c, d;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(from + k * 32 * ROW_BYTES)
                 : "memory");
    left[k][0] = __byte_perm(a, b, even);
    left[k][1] = __byte_perm(a, b, odd);
    left[k][2] = __byte_perm(c, d, even);
    left[k][3] = __byte_perm(c, d, odd);
  }
}

__device__ __forceinline__ float load_early(const float* from) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}

// Finishes a tile's sums before they are stored. Loads its inputs before the sums begin.
template <bool TRANSPOSED>
struct Epilogue {
  const Parameters& p;
  float tokens[2];       // scales of tokens `thread` and `thread` + 128 of the tile
  float features[2];     // scales of this thread's rows of the result, transposed only
  const u32* half;       // the adapter's matrix from this thread's two features on, untransposed only
  int words;             // of a row of that matrix
  u32 first[4];          // its words for the first 16 numbers of the sum

  __device__ __forceinline__ Epilogue(const Parameters& p_, const Tile& tile, int group, u32 program) : p(p_) {
    if constexpr (EIGHT) {
      const int thread = threadIdx.x & 127, warp = thread / 32, row = (thread & 31) / 4, width = p.wide * 2 * FEATURES;
      const int feature = (tile.column * 2 + program) * FEATURES + group * 64 + warp * 16;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = tile.row + thread + i * 128;
        tokens[i] = token < tile.last ? load_early(p.row_scales + token) : 0.0f;
      }
      if constexpr (TRANSPOSED) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          features[i] = p.scales ? load_early(p.scales + (u64)tile.expert * width + feature + row + i * 8) : 1.0f;
      } else if (p.rank > 0) {
        words = width / 2;
        half = reinterpret_cast<const u32*>(p.half + (u64)tile.expert * p.rank * width + feature) + row;
        load_words(first, 0);
      }
    }
  }

  // Words of the adapter's matrix for 16 numbers of the sum from k on; zeros beyond the rank.
  __device__ __forceinline__ void load_words(u32 (&to)[4], int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = k + (threadIdx.x & 3) * 2 + (i & 1) + (i / 2) * 8;
      to[i] = 0;
      if (at < p.rank) asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(to[i]) : "l"(half + (u64)at * words) : "memory");
    }
  }

  // Multiplies the sums of 8-bit numbers by their scales.
  template <int ATOMS>
  __device__ __forceinline__ void scale(float (&result)[ATOMS * 4], u32 all_scales, int group) {
    if constexpr (EIGHT) {
      const int thread = threadIdx.x & 127;
      const u32 scales = all_scales + group * MOST_ATOMS * ATOM * 4;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(scales + (thread + i * 128) * 4), "f"(tokens[i]) : "memory");
      group_meets(group);
#pragma unroll
      for (int atom = 0; atom < ATOMS; ++atom) {
        float one, two;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(one), "=f"(two)
                     : "r"(scales + (atom * ATOM + (thread & 3) * 2) * 4)
                     : "memory");
        const float upper = TRANSPOSED ? features[0] : 1.0f, lower = TRANSPOSED ? features[1] : 1.0f;
        result[atom * 4] *= one * upper;
        result[atom * 4 + 1] *= two * upper;
        result[atom * 4 + 2] *= one * lower;
        result[atom * 4 + 3] *= two * lower;
      }
    }
  }

  // Adds the product of the adapter's matrix, from registers, and its rows in 16 bit at `right`.
  template <int COUNT>
  __device__ __forceinline__ void add_adapter(float (&result)[COUNT], u64 right) const {
    u32 left[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      u32 words_of[4] = {first[0], first[1], first[2], first[3]};
      if (k > 0) load_words(words_of, k * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        left[k][i * 2] = __byte_perm(words_of[i * 2], words_of[i * 2 + 1], 0x5410);
        left[k][i * 2 + 1] = __byte_perm(words_of[i * 2], words_of[i * 2 + 1], 0x7632);
      }
    }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_add_adapter(result, left[k], right + k * (32 >> 4));
  }
};
