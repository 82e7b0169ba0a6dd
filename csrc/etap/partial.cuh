// Partial results as they lie in a slot of the workspace: O^T, not yet divided by the sum, in units of 16 bytes.
//
// A quad is what a thread holds of a block of O^T (64 latent columns) and of 8 rows: rows 8 j + 2 (lane % 4) (+ 1), at
// two columns (see fragment_column). In fp32 a unit is a quad. Packed, it is the quads of two blocks, in fp16, or in
// bf16 where fp16's range does not do. Unit u belongs to thread u % 128 of a warpgroup, j = u / 128 % (rows / 8), and
// the blocks at kQuads (u / 128 / (rows / 8)) (+ 1) in the order of block_at.
//
// Packed is for bf16 output: fp16's rounding error is an eighth of bf16's, and the bytes that go through L2 count at
// the end of a launch.
#pragma once

#include <type_traits>

#include "workspace.cuh"

namespace etap {

template <class T, class Cfg>
constexpr bool kMayPack = Cfg::kWide && std::is_same<T, __nv_bfloat16>::value;
template <class T, class Cfg>
ETAP_DEVICE bool packs_partials(MlaDecodeParams const& p) {
  return kMayPack<T, Cfg> && !p.out_fp32;
}

template <class Cfg, bool Packed>
struct PartialUnits {
  static constexpr int kQuads = Packed ? 2 : 1;  // of a unit
  static constexpr int kRowBlocks = Cfg::kRowTile / 8;
  static constexpr int kCount = Cfg::kRowTile * kLatentDim / (4 * kQuads);

  // Where blocks from the i-th on begin, in the order of block_at; the first block of a unit; the first of its two
  // rows.
  static ETAP_DEVICE int of_block(int i) { return i / kQuads * kRowBlocks * 128; }
  static ETAP_DEVICE int first_block(int unit) { return unit / (128 * kRowBlocks) * kQuads; }
  static ETAP_DEVICE int first_row(int unit) { return 8 * (unit / 128 % kRowBlocks) + 2 * (unit & 3); }
};

// Warpgroup 0's blocks of O^T, then warpgroup 1's.
template <class Cfg>
ETAP_DEVICE int block_at(int i) {
  return Cfg::own_block(i / (kLatentChunks / 2), i % (kLatentChunks / 2));
}

// Stores a thread's quads of `Blocks` blocks in fp32; value(c, i): of the c-th of them, fragment i.
template <class Cfg, int Blocks, class Value>
ETAP_DEVICE void store_quads(float4* to, Value const& value) {
  constexpr int kRowBlocks = Cfg::kRowTile / 8;
#pragma unroll
  for (int c = 0; c < Blocks; ++c) {
#pragma unroll
    for (int j = 0; j < kRowBlocks; ++j) {
      store_relaxed(to + (c * kRowBlocks + j) * 128,
                    make_float4(value(c, 4 * j), value(c, 4 * j + 1), value(c, 4 * j + 2), value(c, 4 * j + 3)));
    }
  }
}

// ---- packed units. The last bit of one tells its format.
template <class Half>
constexpr uint32_t kUnitMark = std::is_same<Half, __half>::value ? 0 : 1;

template <class Half>
ETAP_DEVICE uint4 pack_unit(float const (&f)[8]) {
  uint32_t const last = pack_pair(f[6], f[7], Half{});
  return make_uint4(pack_pair(f[0], f[1], Half{}), pack_pair(f[2], f[3], Half{}), pack_pair(f[4], f[5], Half{}),
                    (last & ~1u) | kUnitMark<Half>);
}

// Of two pairs of fp16 the larger size each; of two pairs of sizes the smaller each. NaN counts as nothing: fp16 has
// NaN.
ETAP_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
  __half2 const top =
      __hmax2(__habs2(reinterpret_cast<__half2 const&>(a)), __habs2(reinterpret_cast<__half2 const&>(b)));
  return reinterpret_cast<uint32_t const&>(top);
}
ETAP_DEVICE uint32_t smaller(uint32_t a, uint32_t b) {
  __half2 const low = __hmin2(reinterpret_cast<__half2 const&>(a), reinterpret_cast<__half2 const&>(b));
  return reinterpret_cast<uint32_t const&>(low);
}
// Whether both of a pair of sizes are below infinity, and both of another at least 2^-13: 2^-25, half of fp16's last
// step there, is then at most 2^-12 of it, as elsewhere.
ETAP_DEVICE bool in_half_range(uint32_t highest, uint32_t lowest) {
  uint32_t const over = highest + 0x04000400u, enough = (lowest | 0x80008000u) - 0x08000800u;  // bit 15 of each half
  return ((over | ~enough) & 0x80008000u) == 0;
}

// store_quads, packed.
template <class Cfg, int Blocks, class Value>
ETAP_DEVICE void store_packed(float4* to, Value const& value) {
  constexpr int kRowBlocks = Cfg::kRowTile / 8;
#pragma unroll
  for (int c = 0; c < Blocks; c += 2) {
    uint4 unit[kRowBlocks];
    auto const pack = [&](auto half) {
#pragma unroll
      for (int j = 0; j < kRowBlocks; ++j) {
        float f[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) f[i] = value(c + i / 4, 4 * j + i % 4);
        unit[j] = pack_unit<decltype(half)>(f);
      }
    };
    pack(__half{});
    uint32_t highest = 0, lowest = 0;
#pragma unroll
    for (int j = 0; j < kRowBlocks; ++j) {
      uint32_t const top = larger(larger(unit[j].x, unit[j].y), larger(unit[j].z, unit[j].w));
      highest = j == 0 ? top : larger(highest, top);
      lowest = j == 0 ? top : smaller(lowest, top);
    }
    if (!in_half_range(highest, lowest)) pack(__nv_bfloat16{});
#pragma unroll
    for (int j = 0; j < kRowBlocks; ++j) {
      store_relaxed(to + (c / 2 * kRowBlocks + j) * 128, reinterpret_cast<float4 const&>(unit[j]));
    }
  }
}

// The sum of a unit over parts, quad by quad.
template <bool Packed>
struct UnitSum {
  static constexpr int kQuads = Packed ? 2 : 1;
  float4 quad[kQuads];

  ETAP_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) quad[i] = make_float4(0, 0, 0, 0);
  }
  // Adds a part; weights of its two rows. What is not written yet makes the sum no number.
  ETAP_DEVICE void add(float4 unit, float first, float second) {
    if constexpr (!Packed) {
      add_quad(0, make_float2(unit.x, unit.y), make_float2(unit.z, unit.w), first, second);
    } else if (__float_as_uint(unit.w) & 1) {
      add_pairs<__nv_bfloat16>(unit, first, second);
    } else {
      add_pairs<__half>(unit, first, second);
    }
  }
  ETAP_DEVICE void add(UnitSum const& other) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      float4 const v = other.quad[i];
      quad[i] = make_float4(quad[i].x + v.x, quad[i].y + v.y, quad[i].z + v.z, quad[i].w + v.w);
    }
  }
  ETAP_DEVICE UnitSum of_lane_below(int distance) const {
    UnitSum from;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      from.quad[i] = make_float4(
          __shfl_down_sync(~0u, quad[i].x, distance), __shfl_down_sync(~0u, quad[i].y, distance),
          __shfl_down_sync(~0u, quad[i].z, distance), __shfl_down_sync(~0u, quad[i].w, distance));
    }
    return from;
  }
  ETAP_DEVICE bool is_number() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) sum += (quad[i].x + quad[i].y) + (quad[i].z + quad[i].w);
    return !isnan(sum);
  }

 private:
  ETAP_DEVICE void add_quad(int i, float2 a, float2 b, float first, float second) {
    quad[i] = make_float4(fmaf(a.x, first, quad[i].x), fmaf(a.y, second, quad[i].y), fmaf(b.x, first, quad[i].z),
                          fmaf(b.y, second, quad[i].w));
  }
  template <class Half>
  ETAP_DEVICE void add_pairs(float4 unit, float first, float second) {
    auto const pair = [](float word) { return unpack_pair(__float_as_uint(word), Half{}); };
    add_quad(0, pair(unit.x), pair(unit.y), first, second);
    add_quad(1, pair(unit.z), pair(unit.w), first, second);
  }
};

}  // namespace etap
