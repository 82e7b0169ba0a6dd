// The consumer warpgroups where both work on every tile (wide); the rest is as in consumer.cuh.
//
// Each holds every second block of 64 latent columns of O^T, of all rows: of 64 rows, one warpgroup's registers would not
// hold O^T, and of fewer nothing is left to exchange at the end of a piece. S^T is split by rows: a warpgroup scores half of
// them, from all of the tile (so keys are read twice from shared memory), and has their statistics. P^T of all rows meets
// in shared memory. Per tile:
//
//   warpgroup g                                                       waits for
//     scores its rows; frees the rope chunk (8 warps do)                the producer, chunk by chunk
//     writes their P^T                                                  the other's V^T P^T of the tile before
//     accumulates its blocks, freeing their chunks (4 warps, twice)     the other's P^T, and with it its scores
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
    for (int i = 0; i < kStats; ++i) smem.control.row_scale[st.first_row() + st.row_of(i)] = factor[i];
  }
  sync_consumers();
#pragma unroll
  for (int j = 0; j < Cfg::kPvRows / 8; ++j) {
    float2 const f = *reinterpret_cast<float2 const*>(&smem.control.row_scale[st.row_of(2 * j) % Cfg::kRowTile]);
#pragma unroll
    for (int c = 0; c < Cfg::kOwnBlocks; ++c) {
      st.out[c][4 * j] *= f.x;
      st.out[c][4 * j + 1] *= f.y;
      st.out[c][4 * j + 2] *= f.x;
      st.out[c][4 * j + 3] *= f.y;
    }
  }
}

// clear_tail for the chunks of this warpgroup, once nobody scores from them any more.
template <class Cfg>
ETAP_DEVICE void clear_own_tail(SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st, RingPosition<Cfg> at,
                                int valid) {
  at.advance(1 + st.group);
  ETAP_ROLLED
  for (int c = 0; c < Cfg::kOwnBlocks; ++c) {
    ETAP_ROLLED
    for (int i = valid * 8 + st.warp * 32 + st.lane; i < kTileKeys * 8; i += 128) {
      *reinterpret_cast<uint4*>(smem.ring[at.slot] + i * 16) = make_uint4(0, 0, 0, 0);
    }
    at.advance(2);
  }
  cutlass::arch::fence_view_async_shared();
  sync_group(st.group);
}

// One tile. `at`: its rope chunk. `meanwhile` is called behind the tile's last sums, with V^T P^T under way.
template <class T, class Cfg, class Meanwhile>
ETAP_DEVICE void consume_tile_wide(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                   MaskBounds const& mask, RingPosition<Cfg> at, int tile, Meanwhile const& meanwhile) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
  bool const first = st.fresh;
  if (!first) NamedBarrier::arrive(kConsumerThreads, kBarrierProbRead0 + st.group);  // the tile before is accumulated
  float scores[Cfg::kScoreRows / 2];
  score_tile<T>(smem, at, st.group, p.box_rows == 0, scores);
  if (st.lane == 0) smem.control.empty[at.slot].arrive();  // the rope chunk
  int const end = (tile + 1) * kTileKeys;
  if (end > mask.len || (p.causal && end > mask.causal_gap + 1)) mask_scores(p, mask, st, tile, scores);
  if (!first) NamedBarrier::sync(kConsumerThreads, kBarrierProbRead0 + (st.group ^ 1));
  uint32_t const prob = shared_address(smem.prob[0]);
  float tile_sum[kStats];
  bool raise = first;  // the first tile sets the reference; a later one rarely has to
  ETAP_ROLLED
  do {
    if (raise) raise_reference_wide(p, smem, st, scores);
    bool const exceeds = write_probabilities<T>(p, st, prob + st.first_row() * 128, scores, tile_sum);
    raise = sync_or(kBarrierConsumers, kConsumerThreads, exceeds);
  } while (raise);
#pragma unroll
  for (int i = 0; i < kStats; ++i) st.sum[i] += tile_sum[i];
  if (end > mask.len) clear_own_tail(smem, st, at, mask.len - tile * kTileKeys);
  accumulate_tile<T>(smem, st, at, prob, meanwhile);
}

}  // namespace etap
