// Partial results as they lie in a slot of the workspace: O^T in fp32, not yet divided by the sum, in quads.
//
// A quad is what a thread holds of a block of O^T (64 latent columns) and of 8 rows: rows 8 j + 2 (lane % 4) (+ 1), at
// two columns (see fragment_column). Quad q belongs to thread q % 128 of a warpgroup, j = q / 128 % (rows / 8), and the
// block at q / 128 / (rows / 8) in the order of block_at.
#pragma once

#include "workspace.cuh"

namespace etap {

template <class Cfg>
struct PartialQuads {
  static constexpr int kRowBlocks = Cfg::kRowTile / 8;
  static constexpr int kCount = Cfg::kRowTile * kLatentDim / 4;

  // Where blocks from the i-th on begin, in the order of block_at; a quad's block; the first of its two rows.
  static ETAP_DEVICE int of_block(int i) { return i * kRowBlocks * 128; }
  static ETAP_DEVICE int block(int quad) { return quad / (128 * kRowBlocks); }
  static ETAP_DEVICE int first_row(int quad) { return 8 * (quad / 128 % kRowBlocks) + 2 * (quad & 3); }
};

// Warpgroup 0's blocks of O^T, then warpgroup 1's.
template <class Cfg>
ETAP_DEVICE int block_at(int i) {
  return Cfg::own_block(i / (kLatentChunks / 2), i % (kLatentChunks / 2));
}

// Stores a thread's quads of `Blocks` blocks; value(c, i): of the c-th of them, fragment i.
template <class Cfg, int Blocks, class Value>
ETAP_DEVICE void store_quads(float4* to, Tag tag, Value const& value) {
  constexpr int kRowBlocks = Cfg::kRowTile / 8;
#pragma unroll
  for (int c = 0; c < Blocks; ++c) {
#pragma unroll
    for (int j = 0; j < kRowBlocks; ++j) {
      store_relaxed(to + (c * kRowBlocks + j) * 128,
                    make_float4(tag.put(value(c, 4 * j)), tag.put(value(c, 4 * j + 1)), tag.put(value(c, 4 * j + 2)),
                                tag.put(value(c, 4 * j + 3))));
    }
  }
}

// The sum of a quad over parts.
struct QuadSum {
  float4 quad;
  uint32_t foreign;  // last bit: a word of another launch was among them

  ETAP_DEVICE void clear() {
    quad = make_float4(0, 0, 0, 0);
    foreign = 0;
  }
  // Adds a part; weights of its two rows. What is not written yet makes the sum no number, or foreign.
  ETAP_DEVICE void add(float4 v, Tag tag, float first, float second) {
    uint32_t const a = tag.take(v.x), b = tag.take(v.y), c = tag.take(v.z), d = tag.take(v.w);
    foreign |= (a | b) | (c | d);
    quad = make_float4(fmaf(__uint_as_float(a), first, quad.x), fmaf(__uint_as_float(b), second, quad.y),
                       fmaf(__uint_as_float(c), first, quad.z), fmaf(__uint_as_float(d), second, quad.w));
  }
  ETAP_DEVICE void add(float4 v) {
    quad = make_float4(quad.x + v.x, quad.y + v.y, quad.z + v.z, quad.w + v.w);
  }
  ETAP_DEVICE float4 of_lane_below(int distance) const {
    return make_float4(__shfl_down_sync(~0u, quad.x, distance), __shfl_down_sync(~0u, quad.y, distance),
                       __shfl_down_sync(~0u, quad.z, distance), __shfl_down_sync(~0u, quad.w, distance));
  }
  ETAP_DEVICE bool is_there() const {
    return !(foreign & 1) && !isnan((quad.x + quad.y) + (quad.z + quad.w));
  }
};

}  // namespace etap
