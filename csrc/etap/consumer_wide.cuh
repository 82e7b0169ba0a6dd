// The consumer warpgroups where both work on every tile (wide); the rest is as in consumer.cuh.
//
// Each takes every second latent chunk: for S^T, with half of the rope chunk's columns, and for its 64 latent columns
// of O^T, of all rows. So each byte of the tile is read by one of them (of the rope chunk too), and nothing is left to
// exchange at the end of a piece but the output. S^T is added up from the two; each has half of the rows' statistics.
// P^T of all rows meets in shared memory. Per tile:
//
//   warpgroup g                                                       waits for
//     scores its chunks; frees the rope chunk (8 warps do)              the producer, chunk by chunk
//     gives the scores of the other's rows, and takes those of its own  the other's, and with them its V^T P^T before
//     writes the P^T of its rows
//     accumulates its blocks, freeing their chunks (4 warps, twice)     the other's P^T
#pragma once

#include "consumer.cuh"

namespace etap {

// raise_reference, where the rows of O^T have their statistics in both warpgroups.
template <class Cfg>
ETAP_DEVICE void raise_reference_wide(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                      float const (&scores)[Cfg::kScoreRows / 2]) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
  float factor[kStats];
  raise_maximum(p, smem, st, scores, factor);
  bool const fresh = st.fresh;
  st.fresh = false;
  if (fresh) return;
  if (st.warp == 0 && st.lane < 4) {
#pragma unroll
    for (int i = 0; i < kStats; ++i) smem.control.out_factor[st.first_row() + st.row_of(i)] = factor[i];
  }
  sync_consumers();
#pragma unroll
  for (int j = 0; j < Cfg::kPvRows / 8; ++j) {
    float2 const f = row_pair<Cfg>(smem.control.out_factor, st, j % (Cfg::kRowTile / 8));
#pragma unroll
    for (int c = 0; c < Cfg::kOwnBlocks; ++c) {
      st.out[c][4 * j] *= f.x;
      st.out[c][4 * j + 1] *= f.y;
      st.out[c][4 * j + 2] *= f.x;
      st.out[c][4 * j + 3] *= f.y;
    }
  }
}

// clear_tail for the chunks of this warpgroup, once none of its warps scores from them any more.
template <class Cfg>
ETAP_DEVICE void clear_own_tail(SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st, RingPosition<Cfg> at,
                                int valid) {
  at.advance(1 + st.group);
  ETAP_ROLLED
  for (int c = 0; c < Cfg::kRingLatent / 2; ++c) {
    ETAP_ROLLED
    for (int i = valid * 8 + st.warp * 32 + st.lane; i < kTileKeys * 8; i += 128) {
      *reinterpret_cast<uint4*>(smem.ring[at.slot] + i * 16) = make_uint4(0, 0, 0, 0);
    }
    at.advance(2);
  }
  cutlass::arch::fence_view_async_shared();
  sync_group(st.group);
}

// S^T of one tile from the chunks whose blocks of O^T are this warpgroup's and half of the rope chunk's columns, all
// rows.
template <class T, class Cfg>
ETAP_DEVICE void score_own_chunks(SharedStorage<Cfg>& smem, RingPosition<Cfg> at, int group, bool gathered,
                                  float (&scores)[Cfg::kRowTile / 2]) {
  constexpr uint32_t kQueryChunk = Cfg::kRowTile * 128 / kDescriptorUnit, kStep = 32 / kDescriptorUnit;
  constexpr int kSteps = kChunkCols / 16;
  uint32_t const ring = descriptor_low(shared_address(smem.ring)), query = descriptor_low(shared_address(smem.query));
  auto const await = [&] {
    smem.control.full[at.slot].wait(at.parity);
    if (gathered) cutlass::arch::fence_view_async_shared();  // cp.async writes through the generic proxy
    return ring + at.slot * (kChunkBytes / kDescriptorUnit);
  };
  uint32_t const half = group * (kSteps / 2) * kStep, rope = await() + half;
  uint32_t q = query + kLatentChunks * kQueryChunk + half;
  cute::warpgroup_arrive();
#pragma unroll
  for (int j = 0; j < kSteps / 2; ++j) {
    wgmma<T, Cfg::kRowTile, Major::K>(descriptor(rope + j * kStep), descriptor(q + j * kStep), scores,
                                      j == 0 ? ScaleOut::Zero : ScaleOut::One);
  }
  cute::warpgroup_commit_batch();
  at.advance(1 + group);
  q = query + group * kQueryChunk;
  ETAP_ROLLED
  for (int c = 0; c < Cfg::kOwnBlocks; ++c) {
    uint32_t const k = await();
    cute::warpgroup_arrive();
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      wgmma<T, Cfg::kRowTile, Major::K>(descriptor(k + j * kStep), descriptor(q + j * kStep), scores, ScaleOut::One);
    }
    cute::warpgroup_commit_batch();
    q += 2 * kQueryChunk;
    at.advance(2);
  }
  cute::warpgroup_wait<0>();
}

// Adds up both warpgroups' scores: each gets those of its rows. `meanwhile` is called between giving and taking. What
// was given may be replaced once all threads have been through write_all_probabilities.
template <class Cfg, class Meanwhile>
ETAP_DEVICE void exchange_scores(SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st,
                                 float const (&all)[Cfg::kRowTile / 2], float (&scores)[Cfg::kScoreRows / 2],
                                 Meanwhile const& meanwhile) {
  int const thread = st.warp * 32 + st.lane;
  bool const upper = st.group == 1;
  constexpr int kOwn = Cfg::kScoreRows / 2;
#pragma unroll
  for (int q = 0; q < Cfg::kGivenQuads; ++q) {
    float give[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float const low = all[4 * q + i], high = all[kOwn + 4 * q + i];
      give[i] = upper ? low : high;
      scores[4 * q + i] = upper ? high : low;
    }
    smem.given[st.group][q][thread] = make_float4(give[0], give[1], give[2], give[3]);
  }
  NamedBarrier::arrive(kConsumerThreads, kBarrierGiven0 + st.group);
  meanwhile();
  NamedBarrier::sync(kConsumerThreads, kBarrierGiven0 + (st.group ^ 1));
#pragma unroll
  for (int q = 0; q < Cfg::kGivenQuads; ++q) {
    float4 const v = smem.given[st.group ^ 1][q][thread];
    scores[4 * q] += v.x;
    scores[4 * q + 1] += v.y;
    scores[4 * q + 2] += v.z;
    scores[4 * q + 3] += v.w;
  }
}

// P^T of all rows, each warpgroup's its own, and the sums.
template <class T, class Cfg>
ETAP_DEVICE void write_all_probabilities(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                         float const (&scores)[Cfg::kScoreRows / 2]) {
  uint32_t const prob = shared_address(smem.prob[0]) + st.first_row() * 128;
  write_raising(
      st, kBarrierConsumers, kConsumerThreads, [&] { raise_reference_wide(p, smem, st, scores); },
      [&](float (&tile_sum)[ConsumerState<Cfg>::kStats]) {
        return write_probabilities<T>(p, st, prob, scores, tile_sum);
      });
}

// One tile. `at`: its rope chunk. `meanwhile` is called behind the tile's last sums, with V^T P^T under way.
template <class T, class Cfg, class Meanwhile>
ETAP_DEVICE void consume_tile_wide(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                   MaskBounds const& mask, RingPosition<Cfg> at, int tile, Meanwhile const& meanwhile) {
  ScaleOut const before = Cfg::kOverwrites && st.fresh ? ScaleOut::Zero : ScaleOut::One;
  float all[Cfg::kRowTile / 2], scores[Cfg::kScoreRows / 2];
  score_own_chunks<T>(smem, at, st.group, p.box_rows == 0, all);
  trace(kScored, st.fresh && st.group + st.warp + st.lane == 0);
  free_rope(smem, at.slot);
  exchange_scores(smem, st, all, scores, [] {});
  int const end = (tile + 1) * kTileKeys;
  if (end > mask.len || (p.causal && end > mask.causal_gap + 1)) mask_scores(p, mask, st, tile, scores);
  write_all_probabilities<T>(p, smem, st, scores);
  if (end > mask.len) clear_own_tail(smem, st, at, mask.len - tile * kTileKeys);
  accumulate_tile<T>(smem, st, at, shared_address(smem.prob[0]), before, meanwhile);
}

}  // namespace etap
