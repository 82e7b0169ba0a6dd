// End of a piece: the two warpgroups' results become one, and go to the output or, if other CTAs hold parts of the
// same rows, to the workspace.
#pragma once

#include "consumer.cuh"
#include "plan.cuh"

namespace etap {

// LSE of one row from its reference maximum (log2 units) and the sum under it.
ETAP_DEVICE void write_lse(MlaDecodeParams const& p, RowTarget const& target, float reference, float sum) {
  if (!p.lse || target.out < 0) return;
  p.lse[target.lse] = sum > 0.0f ? fmaf(reference, p.lse_unit, log2_accurate(sum) * p.lse_unit) : -INFINITY;
}

// Sums of a warpgroup's keys, per row, in every thread; then both statistics in shared memory.
template <class Cfg>
ETAP_DEVICE void publish_statistics(SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
  auto& shared = smem.control.warp_stat[st.group];
#pragma unroll
  for (int i = 0; i < kStats; ++i) {
#pragma unroll
    for (int d = 4; d < 32; d *= 2) st.sum[i] += __shfl_xor_sync(~0u, st.sum[i], d);
    if (st.lane < 4) shared[st.warp][st.row_of(i)] = st.sum[i];
  }
  sync_group(st.group);
#pragma unroll
  for (int i = 0; i < kStats; ++i) {
    int const r = st.row_of(i);
    st.sum[i] = shared[0][r] + shared[1][r] + shared[2][r] + shared[3][r];
    if (st.warp == 0 && st.lane < 4) smem.control.group_stat[st.group][r] = make_float2(st.reference[i], st.sum[i]);
  }
}

// The workspace of a slot, as float4 quads in fragment order: quad q of chunk c belongs to thread q % 128 of a
// warpgroup and holds rows 8 j + 2 (lane % 4) (+ 1), j = q / 128, at latent columns d, d + 8.
template <class Cfg>
ETAP_DEVICE float4* partial_quads(MlaDecodeParams const& p, int slot) {
  return reinterpret_cast<float4*>(p.partial_out) + int64_t(slot) * (Cfg::kRowTile * kLatentDim / 4);
}
template <class Cfg>
ETAP_DEVICE float2* partial_stats(MlaDecodeParams const& p, int slot) {
  return reinterpret_cast<float2*>(p.partial_stats) + int64_t(slot) * Cfg::kRowTile;
}

// The high and the low part of P were accumulated side by side; their sum.
template <class Cfg>
ETAP_DEVICE float folded(ConsumerState<Cfg> const& st, int chunk, int i) {
  if constexpr (Cfg::kConcatP) return st.out[chunk][i] + st.out[chunk][Cfg::kRowTile / 2 + i];
  return st.out[chunk][i];
}

// A partial piece that only warpgroup 0 worked on: all of O^T from its registers.
template <class Cfg>
ETAP_DEVICE void store_alone(float4* quads, ConsumerState<Cfg> const& st) {
  constexpr int kQuads = Cfg::kRowTile / 8;
#pragma unroll
  for (int c = 0; c < kLatentChunks; ++c) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      store_relaxed(quads + (c * kQuads + j) * 128,
                    make_float4(folded(st, c, 4 * j), folded(st, c, 4 * j + 1), folded(st, c, 4 * j + 2),
                                folded(st, c, 4 * j + 3)));
    }
  }
}

template <class Cfg>
ETAP_DEVICE void store_partial(float4* quads, ConsumerState<Cfg> const& st,
                               float const (&result)[4][Cfg::kRowTile / 2]) {
  constexpr int kQuads = Cfg::kRowTile / 8;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      float const* f = result[c] + 4 * j;
      store_relaxed(quads + ((st.group * 4 + c) * kQuads + j) * 128, make_float4(f[0], f[1], f[2], f[3]));
    }
  }
}

// Statistics of a partial result.
template <class Cfg>
ETAP_DEVICE void store_stats(float2* stats, ConsumerState<Cfg> const& st) {
  if (st.warp > 0 || st.lane >= 4) return;
#pragma unroll
  for (int i = 0; i < ConsumerState<Cfg>::kStats; ++i) {
    store_relaxed(stats + st.row_of(i), make_float2(st.reference[i], st.sum[i]));
  }
}

template <class Cfg>
ETAP_DEVICE void store_float(MlaDecodeParams const& p, RowTarget const* rows, ConsumerState<Cfg> const& st,
                             float const (&result)[4][Cfg::kRowTile / 2]) {
#pragma unroll
  for (int i = 0; i < Cfg::kRowTile / 4; ++i) {
    int64_t const target = rows[st.row_of(i)].out;
    if (target < 0) continue;
    float* const out = static_cast<float*>(p.out) + target + st.group * 256 + st.warp * 16 + st.lane / 4;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      out[c * kChunkCols] = result[c][4 * (i / 2) + (i & 1)];
      out[c * kChunkCols + 8] = result[c][4 * (i / 2) + 2 + (i & 1)];
    }
  }
}

// 16-bit output through shared memory: 16 rows of this warpgroup's 256 columns per lent chunk.
template <class T, class Cfg>
ETAP_DEVICE void store_half(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, RowTarget const* rows,
                            ConsumerState<Cfg> const& st, RingPosition<Cfg> const& lent,
                            float const (&result)[4][Cfg::kRowTile / 2]) {
  constexpr int kBlocks = Cfg::kRowTile / 8;
  uint32_t const half = (st.lane >> 3) & 1, upper = st.lane >> 4;
#pragma unroll
  for (int b = 0; b < kBlocks; b += 2) {
    uint32_t const base = shared_address(smem.ring[lent.ahead(b / 2).slot]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float const* f = result[c] + 4 * b;
      uint32_t const col16 = c * 8 + 2 * st.warp + half, row = upper * 8 + (st.lane & 7);
      uint32_t const address = base + row * 512 + ((col16 ^ (row & 7)) << 4);
      uint32_t const low = pack_pair(f[0], f[1], T{}), high = pack_pair(f[2], f[3], T{});
      if constexpr (kBlocks == 1) {
        store_matrices(address, low, high);
      } else {
        store_matrices(address, low, high, pack_pair(f[4], f[5], T{}), pack_pair(f[6], f[7], T{}));
      }
    }
  }
  sync_group(st.group);
  ETAP_ROLLED
  for (int r = st.warp; r < Cfg::kRowTile; r += 4) {
    int64_t const target = rows[r].out;
    if (target < 0) continue;
    int const row = r % 16;
    uint8_t const* from = smem.ring[lent.ahead(r / 16).slot] + row * 512 + ((st.lane ^ (row & 7)) << 4);
    T* const out = static_cast<T*>(p.out) + target + st.group * 256 + st.lane * 8;
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<uint4 const*>(from);
  }
}

// Each warpgroup gives the other its half of O^T's chunks and adds what it is given to its own.
template <int kGroup, class Cfg>
ETAP_DEVICE void exchange_halves(SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st, RingPosition<Cfg> lent,
                                 float const (&weight)[Cfg::kRowTile / 4], float (&result)[4][Cfg::kRowTile / 2]) {
  constexpr int kQuads = Cfg::kRowTile / 8, kMine = kGroup * 4, kTheirs = 4 - kMine;
  constexpr int kHalf = Cfg::kExchangeChunks / 2;  // warpgroup g reads lent chunks g kHalf ..
  int const thread = st.warp * 32 + st.lane;
  auto weighted = [&](int chunk, int i) { return folded(st, chunk, i) * weight[2 * (i / 4) + (i & 1)]; };
  auto quad = [&](int group, int c, int j) {
    int const q = c * kQuads + j;
    return reinterpret_cast<float4*>(smem.ring[lent.ahead(group * kHalf + q / 4).slot]) + (q % 4) * 128 + thread;
  };
  for (int i = 0; i < Cfg::kExchangeChunks; ++i) {
    auto const at = lent.ahead(i);
    smem.control.full[at.slot].wait(at.parity);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      *quad(1 - kGroup, c, j) = make_float4(weighted(kTheirs + c, 4 * j), weighted(kTheirs + c, 4 * j + 1),
                                            weighted(kTheirs + c, 4 * j + 2), weighted(kTheirs + c, 4 * j + 3));
    }
  }
  cutlass::arch::fence_view_async_shared();  // the next writer of these chunks is TMA
  sync_consumers();
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      float4 const v = *quad(kGroup, c, j);
      result[c][4 * j] = weighted(kMine + c, 4 * j) + v.x;
      result[c][4 * j + 1] = weighted(kMine + c, 4 * j + 1) + v.y;
      result[c][4 * j + 2] = weighted(kMine + c, 4 * j + 2) + v.z;
      result[c][4 * j + 3] = weighted(kMine + c, 4 * j + 3) + v.w;
    }
  }
  sync_group(kGroup);  // the chunks may be written again
}

// The two warpgroups' results become one, and go to the output or, if other CTAs hold parts of the same rows, to the
// workspace. `lent`: the chunks that follow the piece's last tile in the ring.
template <class T, class Cfg>
ETAP_DEVICE void finish_piece(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, PieceInfo const& piece,
                              ConsumerState<Cfg>& st, RingPosition<Cfg> lent) {
  constexpr int kStats = ConsumerState<Cfg>::kStats, kHalf = Cfg::kExchangeChunks / 2;
  bool const whole = piece.whole();
  int const slot = piece.slot(piece.part);
  float4* const quads = partial_quads<Cfg>(p, slot) + st.warp * 32 + st.lane;
  publish_statistics(smem, st);
  sync_consumers();  // also: Q may be replaced
  if (!exchanges(piece)) {
    if (st.group > 0) return;
    store_stats(partial_stats<Cfg>(p, slot), st);
    store_alone(quads, st);
    return;
  }
  float weight[kStats];
#pragma unroll
  for (int i = 0; i < kStats; ++i) {
    float2 const other = smem.control.group_stat[1 - st.group][st.row_of(i)];
    float const top = fmaxf(st.reference[i], other.x);
    weight[i] = exp2_approx(st.reference[i] - top);
    st.sum[i] = st.sum[i] * weight[i] + other.y * exp2_approx(other.x - top);
    st.reference[i] = top;
    if (whole) weight[i] *= st.sum[i] > 0.0f ? 1.0f / st.sum[i] : 0.0f;
  }
  if (!whole && st.group == 0) store_stats(partial_stats<Cfg>(p, slot), st);
  float result[4][Cfg::kRowTile / 2];
  if (st.group == 0) {
    exchange_halves<0>(smem, st, lent, weight, result);
  } else {
    exchange_halves<1>(smem, st, lent, weight, result);
  }
  lent = lent.ahead(st.group * kHalf);
  if (!whole) {
    store_partial(quads, st, result);
  } else {
    RowTarget const* const rows = smem.control.rows[piece.table];
    if (st.group == 0 && st.warp == 0 && st.lane < 4) {
#pragma unroll
      for (int i = 0; i < kStats; ++i) write_lse(p, rows[st.row_of(i)], st.reference[i], st.sum[i]);
    }
    if (p.out_fp32) {
      store_float(p, rows, st, result);
    } else {
      store_half<T>(p, smem, rows, st, lent, result);
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
    }
  }
  for (int i = 0; i < kHalf; ++i) {
    if (st.lane == 0) smem.control.empty[lent.ahead(i).slot].arrive();
  }
}

}  // namespace etap
