// The tiles of product.cu, and their assignment to pairs of programs.

constexpr bool EIGHT = BITS == 8;            // of a number of both operands; BITS comes before this file
constexpr int ROW_BYTES = 128;               // of a slice, the unit of TMA's swizzle
constexpr int DEPTH = ROW_BYTES * 8 / BITS;  // length of a slice along the sum
constexpr int FEATURES = 128;  // features of a program's tile; the tiles of a pair are neighbors
constexpr int GROUPS = 2;      // groups of four warps, 64 features each
constexpr int ATOM = 8;        // tokens; a tile has 1 to 32 of them
constexpr int MOST_ATOMS = 32;
constexpr int UNIT = EIGHT ? 2 : 1;  // atoms by which tiles differ: fewer widths take less time to compile
constexpr int MOST_EXPERTS = 64;
constexpr int MOST_PAIRS = 128;
constexpr int MOST_PIECES = 8;  // pieces of a tile
constexpr int PIECES_PER_PAIR = 4;         // for which a pair has memory
constexpr float ADDING = 14;    // time to sum the pieces of a tile, in slices of a whole tile

struct Operands {
  Map left;      // weights, or the adapter's matrix
  Map right[4];  // rows, in boxes of 64, 32, 16 and 8
};

struct Parameters {
  Operands base;
  Operands adapter;  // in 16 bit; of 8-bit products only the rows
  const int* offsets;
  u16* output;
  float4* parts;  // [pieces, programs, groups, VALUES / 4, 128]
  int* counters;  // [tiles, programs, groups], zero before and after a call
  const float* row_scales;  // of 8-bit products: [tokens]
  const float* scales;      // of 8-bit products: [experts, features], or null
  const u16* half;          // of 8-bit products: the adapter's matrix, bf16 [experts, rank, features]
  int experts;
  int wide;   // columns of tiles
  int steps;  // slices along the sum of the base product
  int rank;   // of the adapter, 0: none
};

// Experts in the order of their tiles' size, the largest first: tiles that are computed at the same time begin and end
// together, and find in the L2 cache what others have just read.
struct Plan {
  alignas(16) float load[MOST_PAIRS];  // of pairs; before that, the tile size of experts
  int tile_start[MOST_EXPERTS + 1];
  int expert[MOST_EXPERTS];
  int row_start[MOST_EXPERTS];
  int row_end[MOST_EXPERTS];
  int high[MOST_EXPERTS];   // tiles in a column
  int least[MOST_EXPERTS];  // atoms of each
  int more[MOST_EXPERTS];   // number of tiles that have one unit more
  int was[GROUPS];
};

struct Tile {
  int expert, row, atoms, last, column;
};

__device__ __forceinline__ Tile find(const Plan& plan, int number) {
  int at = 0;
  while (number >= plan.tile_start[at + 1]) ++at;
  const int local = number - plan.tile_start[at], high = plan.high[at];
  // Each column begins with another tile: larger tiles would otherwise fall to the same pair every round.
  const int column = local / high, down = (local + column) % high;
  const int least = plan.least[at], more = plan.more[at];
  return {plan.expert[at], plan.row_start[at] + (down * least + min(down, more) * UNIT) * ATOM,
          least + (down < more) * UNIT, plan.row_end[at], column};
}

// All threads of a program must call.
__device__ __forceinline__ void plan_tiles(Plan& plan, const Parameters& p) {
  const int me = threadIdx.x;
  int begin = 0, end = 0, atoms = 0, high = 0;
  float size = 0;
  if (me < p.experts) {
    begin = me ? p.offsets[me - 1] : 0;
    end = p.offsets[me];
    atoms = (end - begin + UNIT * ATOM - 1) / (UNIT * ATOM) * UNIT;
    // Small tiles have even numbers of atoms: fewer widths take less time to compile.
    if (atoms < MOST_ATOMS / 2) atoms += atoms & 1;
    high = (atoms + MOST_ATOMS - 1) / MOST_ATOMS;
    size = high ? (float)atoms / high : 0.0f;
    plan.load[me] = size;
  }
  __syncthreads();
  if (me < p.experts) {
    int at = 0;
    for (int other = 0; other < p.experts; ++other)
      at += plan.load[other] > size || (plan.load[other] == size && other < me);
    plan.expert[at] = me;
    plan.row_start[at] = begin;
    plan.row_end[at] = end;
    plan.high[at] = high;
    plan.least[at] = high ? atoms / UNIT / high * UNIT : 0;
    plan.more[at] = high ? atoms / UNIT % high : 0;
  }
  __syncthreads();
  if (me <= p.experts) {
    int before = 0;
    for (int at = 0; at < me; ++at) before += plan.high[at];
    plan.tile_start[me] = before * p.wide;
  }
  __syncthreads();
}

// Returns about how many atoms a pair computes in the rounds of `whole` tiles.
__device__ __forceinline__ float load_of(const Plan& plan, int experts, int whole, int pair, int pairs) {
  float load = 0;
  for (int at = 0, before = 0; at < experts && plan.tile_start[at] < whole; ++at) {
    const int after = (min(plan.tile_start[at + 1], whole) + pairs - 1 - pair) / pairs;
    if (plan.high[at]) load += (after - before) * (plan.least[at] + (float)plan.more[at] * UNIT / plan.high[at]);
    before = after;
  }
  return load;
}

// Returns into how many pieces each of the tiles is split that remain after the rounds: the number that takes the least
// time. All threads of a warp must call; each tries one number.
__device__ __forceinline__ int pieces_of(int rest, int pairs, int slices) {
  const int pieces = (threadIdx.x & (MOST_PIECES - 1)) + 1;
  const float time = (float)((rest * pieces + pairs - 1) / pairs) / pieces + (pieces > 1 ? ADDING / slices : 0);
  const bool fits = pieces == 1 || rest * pieces <= PIECES_PER_PAIR * pairs;
  // The rounded time, then the number of pieces: of two equal times the smaller number wins.
  const u32 least = __reduce_min_sync(~0u, fits ? (u32)(time * 65536) * MOST_PIECES + pieces - 1 : ~0u);
  return (least & (MOST_PIECES - 1)) + 1;
}

// The work of a pair in order: one tile of every round, then pieces of the remaining tiles. Pairs with the least load
// take the first pieces. Neighbors take the same piece of neighboring tiles, which read the same rows and weights.
struct Work {
  int number, pairs, whole, rest, pieces, slices, piece;
  // The current item:
  Tile tile;
  int begin, end;  // slices
  int left, part;  // index among the remaining tiles, and the piece of it

  // All threads of a program must call.
  __device__ __forceinline__ Work(Plan& plan, const Parameters& p, int pair, int pairs_) : number(pair), pairs(pairs_) {
    slices = p.steps + (p.rank > 0);
    const int tiles = plan.tile_start[p.experts], me = threadIdx.x;
    whole = tiles / pairs * pairs;
    rest = tiles - whole;
    if (me < MOST_PAIRS) plan.load[me] = me < pairs ? load_of(plan, p.experts, whole, me, pairs) : 1e30f;
    pieces = pieces_of(rest, pairs, slices);
    __syncthreads();
    piece = 0;
    const float load = plan.load[pair];
    for (int other = 0; other < pairs; other += 4) {
      const float4 loads = *reinterpret_cast<const float4*>(plan.load + other);
      piece += loads.x < load || (loads.x == load && other < pair);
      piece += loads.y < load || (loads.y == load && other + 1 < pair);
      piece += loads.z < load || (loads.z == load && other + 2 < pair);
      piece += loads.w < load || (loads.w == load && other + 3 < pair);
    }
  }

  __device__ __forceinline__ bool next(const Plan& plan) {
    if (number < whole) {
      tile = find(plan, number);
      number += pairs;
      begin = 0;
      end = slices;
      return true;
    }
    if (piece >= rest * pieces) return false;
    part = piece / rest;
    left = piece - part * rest;
    tile = find(plan, whole + left);
    begin = part * slices / pieces;
    end = (part + 1) * slices / pieces;
    piece += pairs;
    return true;
  }

  __device__ bool is_piece() const { return end - begin < slices; }
  // Index of a piece of the tile in the memory for pieces.
  __device__ u64 place_of(int which) const { return (u64)left * pieces + which; }
};
