// End of a piece: the two warpgroups' results become one, and go to the output or, if other CTAs hold parts of the
// same rows, to the workspace. Where they share tiles, each warpgroup has results of its own: half the columns.
#pragma once

#include "consumer_wide.cuh"
#include "partial.cuh"
#include "plan.cuh"

namespace etap {

// Which of a warp's 16 latent columns a thread's fragment of O^T holds: this one, and the one kColumnStep further.
// e4m3 values come from shared memory in pairs of neighbours.
template <class Cfg>
ETAP_DEVICE int fragment_column(int lane) {
  return Cfg::kE4m3 ? lane / 4 * 2 : lane / 4;
}
template <class Cfg>
constexpr int kColumnStep = Cfg::kE4m3 ? 1 : 8;

// LSE of one row from its reference maximum (log2 units) and the sum under it.
ETAP_DEVICE void write_lse(MlaDecodeParams const& p, RowTarget const& target, float reference, float sum) {
  if (!p.lse || target.out < 0) return;
  p.lse[target.lse] = sum > 0.0f ? fmaf(reference, p.lse_unit, log2_accurate(sum) * p.lse_unit) : -INFINITY;
}

// Statistics of this warpgroup's keys, for both: sums per warp, and the reference.
template <class Cfg>
ETAP_DEVICE void publish_statistics(SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
#pragma unroll
  for (int d = 4; d < 32; d *= 2) {
#pragma unroll
    for (int i = 0; i < kStats; ++i) st.sum[i] += __shfl_xor_sync(~0u, st.sum[i], d);
  }
  if (st.lane >= 4) return;
#pragma unroll
  for (int i = 0; i < kStats; ++i) warp_entry(smem.control.warp_stat[st.group][st.row_of(i)], st.warp) = st.sum[i];
  if (st.warp > 0) return;
#pragma unroll
  for (int i = 0; i < kStats; ++i) smem.control.reference[st.group][st.row_of(i)] = st.reference[i];
}

// The sum of a row over a warpgroup's keys, as published.
template <class Cfg>
ETAP_DEVICE float group_sum(SharedStorage<Cfg> const& smem, int group, int row) {
  float4 const s = smem.control.warp_stat[group][row];
  return (s.x + s.y) + (s.z + s.w);
}

// Both warpgroups' statistics become one, in st; own and other weigh the two O^T.
template <class Cfg>
ETAP_DEVICE void join_statistics(SharedStorage<Cfg> const& smem, ConsumerState<Cfg>& st,
                                 float (&own)[Cfg::kRowTile / 4], float (&other)[Cfg::kRowTile / 4]) {
#pragma unroll
  for (int i = 0; i < ConsumerState<Cfg>::kStats; ++i) {
    int const r = st.row_of(i);
    float const theirs = smem.control.reference[1 - st.group][r], top = fmaxf(st.reference[i], theirs);
    own[i] = exp2_approx(st.reference[i] - top);
    other[i] = exp2_approx(theirs - top);
    st.reference[i] = top;
    st.sum[i] = group_sum(smem, st.group, r) * own[i] + group_sum(smem, 1 - st.group, r) * other[i];
  }
}

// The high and the low part of P were accumulated side by side; their sum.
template <class Cfg>
ETAP_DEVICE float folded(ConsumerState<Cfg> const& st, int chunk, int i) {
  if constexpr (Cfg::kConcatP) return st.out[chunk][i] + st.out[chunk][Cfg::kRowTile / 2 + i];
  return st.out[chunk][i];
}

// Statistics of a partial result, of the rows that the warpgroup scores.
template <class Cfg>
ETAP_DEVICE void store_stats(float2* stats, ConsumerState<Cfg> const& st) {
  if (st.warp > 0 || st.lane >= 4) return;
#pragma unroll
  for (int i = 0; i < ConsumerState<Cfg>::kStats; ++i) {
    store_relaxed(stats + st.first_row() + st.row_of(i), make_float2(st.reference[i], st.sum[i]));
  }
}

template <class Cfg>
ETAP_DEVICE void store_float(MlaDecodeParams const& p, RowTarget const* rows, ConsumerState<Cfg> const& st,
                             float const (&result)[4][Cfg::kRowTile / 2]) {
#pragma unroll
  for (int i = 0; i < Cfg::kRowTile / 4; ++i) {
    int64_t const target = rows[st.row_of(i)].out;
    if (target < 0) continue;
    float* const out = static_cast<float*>(p.out) + target + Cfg::own_block(st.group, 0) * kChunkCols +
                       st.warp * 16 + fragment_column<Cfg>(st.lane);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int const column = Cfg::own_block(0, c) * kChunkCols;
      out[column] = result[c][4 * (i / 2) + (i & 1)];
      out[column + kColumnStep<Cfg>] = result[c][4 * (i / 2) + 2 + (i & 1)];
    }
  }
}

// A thread's pairs of neighbouring latent columns, of rows 2 (lane % 4) (+ 1) (+ 8), to 512-byte rows.
template <class T, int Blocks>
ETAP_DEVICE void store_neighbours(uint32_t base, uint32_t col16, int lane, float const* f) {
  uint32_t const pair = lane / 4;
#pragma unroll
  for (int i = 0; i < 2 * (Blocks > 1 ? 2 : 1); ++i) {
    uint32_t const row = 2 * (lane & 3) + (i & 1) + i / 2 * 8;
    uint32_t const address = base + row * 512 + (((col16 + pair / 4) ^ (row & 7)) << 4) + pair % 4 * 4;
    store_shared(address, pack_pair(f[4 * (i / 2) + (i & 1)], f[4 * (i / 2) + 2 + (i & 1)], T{}));
  }
}

// 8 KB of the warpgroup's own, for its output on the way: the i-th chunk lent to it, or a part of Q.
template <class Cfg>
ETAP_DEVICE uint8_t* staging_chunk(SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st,
                                   RingPosition<Cfg> const& lent, int i) {
  static_assert(!Cfg::kWide || Cfg::kQueryBytes >= kConsumerGroups * Cfg::kRowTile / 16 * kChunkBytes);
  if constexpr (Cfg::kWide) return smem.query[0] + (st.group * (Cfg::kRowTile / 16) + i) * kChunkBytes;
  return smem.ring[lent.ahead(i).slot];
}

// 16-bit output through shared memory: 16 rows of this warpgroup's 256 columns per staging chunk.
template <class T, class Cfg>
ETAP_DEVICE void store_half(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, RowTarget const* rows,
                            ConsumerState<Cfg> const& st, RingPosition<Cfg> const& lent,
                            float const (&result)[4][Cfg::kRowTile / 2]) {
  constexpr int kBlocks = Cfg::kRowTile / 8;
  uint32_t const half = (st.lane >> 3) & 1, upper = st.lane >> 4;
#pragma unroll
  for (int b = 0; b < kBlocks; b += 2) {
    uint32_t const base = shared_address(staging_chunk(smem, st, lent, b / 2));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float const* f = result[c] + 4 * b;
      uint32_t const col16 = c * 8 + 2 * st.warp + half, row = upper * 8 + (st.lane & 7);
      uint32_t const address = base + row * 512 + ((col16 ^ (row & 7)) << 4);
      uint32_t const low = pack_pair(f[0], f[1], T{}), high = pack_pair(f[2], f[3], T{});
      if constexpr (Cfg::kE4m3) {
        store_neighbours<T, kBlocks>(base, c * 8 + 2 * st.warp, st.lane, f);
      } else if constexpr (kBlocks == 1) {
        store_matrices(address, low, high);
      } else {
        store_matrices(address, low, high, pack_pair(f[4], f[5], T{}), pack_pair(f[6], f[7], T{}));
      }
    }
  }
  sync_group(st.group);
  int const column = Cfg::kWide ? Cfg::own_block(st.group, st.lane / 8) * kChunkCols + st.lane % 8 * 8
                                : st.group * 256 + st.lane * 8;
  T* const out = static_cast<T*>(p.out) + column;
  constexpr int kBatch = Cfg::kRowTile < 16 ? 2 : 4;  // rows of a warp that are read at once
  ETAP_ROLLED
  for (int first = st.warp; first < Cfg::kRowTile; first += 4 * kBatch) {
    int64_t target[kBatch];
    uint4 value[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      int const r = first + 4 * k, row = r % 16;
      target[k] = rows[r].out;
      value[k] = *reinterpret_cast<uint4 const*>(staging_chunk(smem, st, lent, r / 16) + row * 512 +
                                                 ((st.lane ^ (row & 7)) << 4));
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (target[k] >= 0) *reinterpret_cast<uint4*>(out + target[k]) = value[k];
    }
  }
}

// Where warpgroup `group` finds the quads of O^T that the other gives it, in the lent chunks.
template <class Cfg>
ETAP_DEVICE float4* given_quad(SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st, RingPosition<Cfg> lent,
                               int group, int c, int j) {
  constexpr int kQuads = Cfg::kRowTile / 8, kHalf = Cfg::kExchangeChunks / 2;
  int const q = c * kQuads + j;
  return reinterpret_cast<float4*>(smem.ring[lent.ahead(group * kHalf + q / 4).slot]) + (q % 4) * 128 + st.warp * 32 +
         st.lane;
}

// Each warpgroup gives the other its half of O^T's chunks.
template <class Cfg>
ETAP_DEVICE void give_half(SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st, RingPosition<Cfg> lent) {
  await_previous_pass(smem, lent, Cfg::kExchangeChunks, st.lane);
  for (int i = 0; i < Cfg::kExchangeChunks; ++i) {
    auto const at = lent.ahead(i);
    smem.control.full[at.slot].wait(at.parity);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int j = 0; j < Cfg::kRowTile / 8; ++j) {
      *given_quad(smem, st, lent, 1 - st.group, c, j) =
          make_float4(folded(st, 4 + c, 4 * j), folded(st, 4 + c, 4 * j + 1), folded(st, 4 + c, 4 * j + 2),
                      folded(st, 4 + c, 4 * j + 3));
    }
  }
  cutlass::arch::fence_view_async_shared();  // the next writer of these chunks is TMA
}

// ... and adds what it was given to its own half.
template <class Cfg>
ETAP_DEVICE void take_half(SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st, RingPosition<Cfg> lent,
                           float const (&own)[Cfg::kRowTile / 4], float const (&other)[Cfg::kRowTile / 4],
                           float (&result)[4][Cfg::kRowTile / 2]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int j = 0; j < Cfg::kRowTile / 8; ++j) {
      float4 const v = *given_quad(smem, st, lent, st.group, c, j);
      float const given[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const row = 2 * j + (i & 1);
        result[c][4 * j + i] = fmaf(folded(st, c, 4 * j + i), own[row], given[i] * other[row]);
      }
    }
  }
}

// The two warpgroups' results become one, and go to the output or, if other CTAs hold parts of the same rows, to the
// workspace. `lent`: the chunks that follow the piece's last tile in the ring.
template <class T, class Cfg>
ETAP_DEVICE void finish_piece(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, PieceInfo const& piece,
                              ConsumerState<Cfg>& st, RingPosition<Cfg> lent) {
  constexpr int kStats = ConsumerState<Cfg>::kStats, kHalf = Cfg::kExchangeChunks / 2;
  bool const whole = piece.whole(), exchange = exchanges(piece);
  PartialBuffer<Cfg> const buffer(p, smem.control.epoch);
  int const slot = piece.slot(piece.part);
  float4* const quads = buffer.quads(slot) + st.warp * 32 + st.lane;
  if (exchange) give_half(smem, st, lent);
  publish_statistics(smem, st);
  sync_consumers();  // also: Q may be replaced
  float own[kStats], other[kStats];
  if (exchange || Cfg::kRowTile == 32) {  // the shorter way would cost them spilled registers
    join_statistics(smem, st, own, other);
  } else {
#pragma unroll
    for (int i = 0; i < kStats; ++i) st.sum[i] = group_sum(smem, 0, st.row_of(i));
  }
  if (!whole && st.group == 0) {
    store_stats(buffer.stats(slot), st);
    if (st.warp == 0 && st.lane == 0) mark_used(p, smem.control.epoch, slot);
  }
  if (!exchange) {  // only warpgroup 0 worked on it: all of O^T from its registers
    if (st.group == 0) {
      store_quads<Cfg, kLatentChunks>(quads, buffer.tag, [&](int c, int i) { return folded(st, c, i); });
    }
    return;
  }
  if (whole) {
#pragma unroll
    for (int i = 0; i < kStats; ++i) {
      float const scale = st.sum[i] > 0.0f ? value_scale(smem, piece.table) / st.sum[i] : 0.0f;
      own[i] *= scale;
      other[i] *= scale;
    }
  }
  float result[4][Cfg::kRowTile / 2];
  take_half(smem, st, lent, own, other, result);
  lent = lent.ahead(st.group * kHalf);
  if (!whole) {
    store_quads<Cfg, 4>(quads + PartialQuads<Cfg>::of_block(4 * st.group), buffer.tag,
                        [&](int c, int i) { return result[c][i]; });
  } else {
    sync_group(st.group);  // the chunks may be written again
    RowTarget const* const rows = smem.control.rows[piece.table];
    int lane = st.lane;
    keep(lane);  // else the condition is worked out before the first tile, and spilled
    if (st.group == 0 && st.warp == 0 && lane < 4) {
#pragma unroll
      for (int i = 0; i < kStats; ++i) write_lse(p, rows[st.row_of(i)], st.reference[i], st.sum[i]);
    }
    if (p.out_fp32) {
      store_float(p, rows, st, result);
    } else {
      store_half<T>(p, smem, rows, st, lent, result);
      cutlass::arch::fence_view_async_shared();
    }
  }
  for (int i = 0; i < kHalf; ++i) free_latent(smem, lent.ahead(i).slot);
}

// Shared tiles, while the last one's V^T P^T is under way: the piece's statistics, a lane for each row that the
// warpgroup scores, and where its part of O^T goes or what it is multiplied by.
template <class Cfg>
ETAP_DEVICE void finish_statistics_wide(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, PieceInfo const& piece,
                                        ConsumerState<Cfg>& st) {
  keep(st.lane);  // else addresses that it gives are kept, spilled, from piece to piece
  publish_statistics(smem, st);
  sync_group(st.group);
  bool const has_row = st.warp == 0 && st.lane < Cfg::kScoreRows;
  int const own_row = has_row ? st.lane : 0, row = st.first_row() + own_row;
  float const sum = group_sum(smem, st.group, own_row), reference = smem.control.reference[st.group][own_row];
  if (piece.whole()) {
    if (!has_row) return;
    smem.control.out_factor[row] = sum > 0.0f ? value_scale(smem, piece.table) / sum : 0.0f;
    write_lse(p, smem.control.rows[piece.table][row], reference, sum);
    return;
  }
  PartialBuffer<Cfg> const buffer(p, smem.control.epoch);
  int const slot = piece.slot(piece.part), first = Cfg::kOwnBlocks * st.group;
  if (has_row) store_relaxed(buffer.stats(slot) + row, make_float2(reference, sum));
  if (st.group == 0 && st.warp == 0 && st.lane == 0) mark_used(p, smem.control.epoch, slot);
  st.partial = buffer.quads(slot) + PartialQuads<Cfg>::of_block(first) + st.warp * 32 + st.lane;
}

// Shared tiles: nothing is exchanged but statistics. Output goes through Q's space, so no ring chunks are lent, and the
// next piece's keys are loaded meanwhile.
template <class T, class Cfg>
ETAP_DEVICE void finish_piece_wide(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, PieceInfo const& piece,
                                   ConsumerState<Cfg>& st) {
  constexpr int kBlocks = Cfg::kOwnBlocks;
  if (!piece.whole()) {
    Tag const tag = PartialBuffer<Cfg>(p, smem.control.epoch).tag;
    store_quads<Cfg, kBlocks>(st.partial, tag, [&](int c, int i) { return folded(st, c, i); });
    return;
  }
  sync_consumers();
  RowTarget const* const rows = smem.control.rows[piece.table];
  float result[kBlocks][Cfg::kRowTile / 2];
#pragma unroll
  for (int j = 0; j < Cfg::kRowTile / 8; ++j) {
    float2 const factor = row_pair<Cfg>(smem.control.out_factor, st, j);
#pragma unroll
    for (int c = 0; c < kBlocks; ++c) {
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) result[c][i] = folded(st, c, i) * (i % 2 ? factor.y : factor.x);
    }
  }
  if (p.out_fp32) {
    store_float(p, rows, st, result);
  } else {
    store_half<T>(p, smem, rows, st, RingPosition<Cfg>{}, result);
    sync_consumers();  // the next Q may come
  }
}

}  // namespace etap
