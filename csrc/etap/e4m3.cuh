// e4m3 tiles as wgmma's A operand from registers: fragments come out of shared memory by ldmatrix and are widened to
// fp16, which holds every e4m3 value exactly.
//
// A group is the A operand of four k16 steps of wgmma: 64 keys x 64 columns of K, or 64 latent columns x 64 keys of
// V^T. Its bytes are eight registers a thread.
//
//   K    A register of ldmatrix holds columns 4q .. 4q + 3 (q = lane % 4) of one key, a fragment needs columns
//        2q, 2q + 1 and 8 + 2q, 9 + 2q of each 16. So Q's columns are permuted: see load_query_e4m3.
//   V^T  The transposing ldmatrix moves byte pairs: latent columns 2i, 2i + 1 (i = lane / 4) of keys 2q, 2q + 1. One
//        byte permutation sorts them by column. Rows i and i + 8 of a warp's fragment are then latent columns 2i and
//        2i + 1: see fragment_column.
#pragma once

#include "storage.cuh"

namespace etap {

// Four e4m3 to two pairs of fp16.
ETAP_DEVICE void widen(uint32_t bytes, uint32_t& low, uint32_t& high) {
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}"
      : "=r"(low), "=r"(high)
      : "r"(bytes));
}


ETAP_DEVICE void widen_keys(uint32_t const (&bytes)[8], Group& a) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    widen(bytes[2 * j], a[j][0], a[j][2]);
    widen(bytes[2 * j + 1], a[j][1], a[j][3]);
  }
}
ETAP_DEVICE void widen_values(uint32_t const (&bytes)[8], Group& a) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t const sorted = __byte_perm(bytes[i], 0, 0x3120);
    widen(sorted, a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]);
  }
}

// Where a lane's rows for ldmatrix lie, as byte offsets in a chunk.
struct LaneOffsets {
  uint32_t rope, keys, values;

  ETAP_DEVICE LaneOffsets(int warp, int lane) {
    uint32_t const matrix = lane >> 3, row8 = lane & 7, key = warp * 16 + (matrix & 1) * 8 + row8;
    rope = key * 64 + ((matrix >> 1 ^ (key >> 1 & 3)) << 4);  // 64-byte rows and swizzle
    keys = swizzled(key, matrix >> 1);
    values = swizzled(matrix * 8 + row8, warp);
  }
};

// `address`: that of the lane in the chunk. The columns' part of it is swizzled, so steps there are exclusive ors.
ETAP_DEVICE void load_rope_group(uint32_t (&bytes)[8], uint32_t address) {
  load_matrices(bytes, 0, address);
  load_matrices(bytes, 4, address ^ 32);
}
ETAP_DEVICE void load_key_group(uint32_t (&bytes)[8], uint32_t address, int half) {
  load_matrices(bytes, 0, address ^ (half * 64));
  load_matrices(bytes, 4, address ^ (half * 64 + 32));
}
ETAP_DEVICE void load_value_group(uint32_t (&bytes)[8], uint32_t address, int half) {
  load_matrices_transposed(bytes, 0, address ^ (half * 64));
  load_matrices_transposed(bytes, 4, (address ^ (half * 64)) + 32 * 128);
}

}  // namespace etap
