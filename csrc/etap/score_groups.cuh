// S^T over an e4m3 cache with scales for groups of latent columns: see consumer_groups.cuh.
#pragma once

#include "consumer_e4m3.cuh"

namespace etap {

// Loads the piece's query rows: the latent part as fp16, each row times a power of two; the rope part likewise, with a
// power of its own, or as it is where the cache's is of the same type.
template <class T, class Cfg>
ETAP_DEVICE void load_query_groups(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, PieceInfo const& piece,
                                   int thread) {
  using Vectors = QueryVectors<Cfg>;
  int const r = thread / Vectors::kLanes, lane = thread % Vectors::kLanes;
  Vectors const q(p, piece, thread);
  float const ckv_scale = latent_scale(p, piece.request);  // 1 beside scales of groups
  QueryScale const latent(largest_of_row<Cfg>(latent_exponent<T>(q)));
  if (thread == 0) smem.control.value_scale[piece.table] = ckv_scale;
  if (lane == 0) smem.control.row_scale[r] = finite_factor(p.scale_log2 * ckv_scale * latent.down);
#pragma unroll
  for (int k = 0; k < Vectors::kLatent; ++k) {
    int const v = lane + k * Vectors::kLanes;
    store_query_scaled<T>(smem.query[v / 8], r, v % 8, q.latent[k], latent.up);
  }
  if constexpr (Cfg::kRope16) {
    if (lane < 8) *reinterpret_cast<uint4*>(smem.query[kLatentChunks] + swizzled(r, lane)) = q.rope[0];
  } else {
    QueryScale const rope(largest_of_row<Cfg>(rope_exponent<T>(q)));
    if (lane == 0) {
      smem.control.rope_scale[r] = finite_factor(p.scale_log2 * rope_scale(p, piece.request) * rope.down);
    }
    if (lane < 8) store_query_scaled<T>(smem.query[kLatentChunks], r, lane, q.rope[0], rope.up);
  }
  if (!p.group_scale) {  // nobody else writes them
    ETAP_ROLLED
    for (int i = thread; i < kScaleTiles * kTileKeys; i += kConsumerThreads) {
      smem.control.scales[i / kTileKeys][i % kTileKeys] = make_float4(1, 1, 1, 1);
    }
  }
  cutlass::arch::fence_view_async_shared();
}

// The group of columns that the c-th latent chunk of a tile is: see latent_chunk.
ETAP_DEVICE int scale_group(int c, int group) { return c ^ (group * (kScaleGroups / 2)); }

// Keeps a use of wgmma's results behind the wait for them.
template <int N>
ETAP_DEVICE void fence_results(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(d[i]);
}

// Adds a chunk's products to the scores. `low`, `high`: its scales for the thread's two keys.
template <class Cfg>
ETAP_DEVICE void add_products(SharedStorage<Cfg> const& smem, ConsumerState<Cfg> const& st, float low, float high,
                              float (&products)[Cfg::kRowTile / 2], float (&scores)[Cfg::kRowTile / 2]) {
  fence_results(products);
#pragma unroll
  for (int i = 0; i < ConsumerState<Cfg>::kStats; ++i) {
    float const factor = smem.control.row_scale[st.row_of(i)];
    int const at = 4 * (i / 2) + (i & 1);
    scores[at] = fmaf(products[at], low * factor, scores[at]);
    scores[at + 2] = fmaf(products[at + 2], high * factor, scores[at + 2]);
  }
}

// The rope chunk's products, left in flight.
template <class T, class Cfg>
ETAP_DEVICE void score_rope(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, E4m3Pipeline& pipe,
                            LaneOffsets const& offsets, RingPosition<Cfg> at, int lane,
                            float (&scores)[Cfg::kRowTile / 2]) {
  constexpr uint32_t kStep = 32 / kDescriptorUnit;
  uint32_t const query = descriptor_low(shared_address(smem.query[kLatentChunks])), keys = chunk_address(smem, at);
  smem.control.full[at.slot].wait(at.parity);
  if constexpr (Cfg::kRope16) {
    if (p.box_rows == 0) cutlass::arch::fence_view_async_shared();  // cp.async writes through the generic proxy
    cute::warpgroup_arrive();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<T, Cfg::kRowTile, Major::K>(descriptor(descriptor_low(keys) + j * kStep), descriptor(query + j * kStep),
                                        scores, j == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
  } else {
    load_rope_group(pipe.bytes, keys + offsets.rope);
    widen_keys(pipe.bytes, pipe.a[0]);
    release_chunk(smem, at, lane);
    cute::warpgroup_arrive();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Cfg::kRowTile>(pipe.a[0][j], descriptor(query + j * kStep), scores,
                           j == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
  }
  cute::warpgroup_commit_batch();
}

// Brings the rope chunk's products to log2 units, once they are there, and frees the chunk.
template <class Cfg>
ETAP_DEVICE void finish_rope(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st,
                             RingPosition<Cfg> at, float (&scores)[Cfg::kRowTile / 2]) {
  if (Cfg::kRope16) release_chunk(smem, at, st.lane);
  fence_results(scores);
#pragma unroll
  for (int i = 0; i < ConsumerState<Cfg>::kStats; ++i) {
    float factor = p.scale_log2;
    if constexpr (!Cfg::kRope16) factor = smem.control.rope_scale[st.row_of(i)];
    scores[4 * (i / 2) + (i & 1)] *= factor;
    scores[4 * (i / 2) + 2 + (i & 1)] *= factor;
  }
}

// The latent chunks' part of S^T, with two sets of accumulators: a chunk is added up while wgmma works on the next.
// `at`: the rope chunk. Leaves the bytes of the first block of V^T in `pipe`.
template <class Cfg>
ETAP_DEVICE void score_latent(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st,
                              E4m3Pipeline& pipe, LaneOffsets const& offsets, RingPosition<Cfg> at,
                              float const* scales, float (&scores)[Cfg::kRowTile / 2]) {
  constexpr uint32_t kQueryChunk = Cfg::kRowTile * 128 / kDescriptorUnit, kStep = 32 / kDescriptorUnit;
  constexpr int kGroups = 2 * Cfg::kRingLatent;
  uint32_t const query = descriptor_low(shared_address(smem.query));
  uint32_t const values = chunk_address(smem, at.ahead(1)) + offsets.values;
  RingPosition<Cfg> const rope = at;
  float products[2][Cfg::kRowTile / 2];  // of chunks in turn
  float low = 0, high = 0;               // scales of the chunk that is added next
  uint32_t keys = 0;
  auto load = [&](int g) {
    if (g % 2 == 0) {
      at.advance();
      smem.control.full[at.slot].wait(at.parity);
      keys = chunk_address(smem, at) + offsets.keys;
    }
    load_key_group(pipe.bytes, keys, g % 2);
  };
  auto load_scales = [&](int c) {
    int const i = scale_group(c, st.group);
    low = scales[i];
    high = scales[8 * kScaleGroups + i];
  };
  load(0);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    int const c = g / 2, half = g % 2;
    Group& a = pipe.a[(g + 1) & 1];  // the rope chunk had 0
    if (half == 1 && c > 0) load_scales(c - 1);
    if (g > 0) cute::warpgroup_wait<1>();  // the group before last is done with its fragments
    widen_keys(pipe.bytes, a);
    if (half == 0) load(g + 1);
    if (g == 1) finish_rope(p, smem, st, rope, scores);
    if (half == 1 && c > 0) add_products(smem, st, low, high, products[(c - 1) & 1], scores);
    cute::warpgroup_arrive();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Cfg::kRowTile>(a[j], descriptor(query + latent_chunk(g, st.group) * kQueryChunk + j * kStep),
                           products[c & 1], half + j == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
    cute::warpgroup_commit_batch();
    if (half == 1 && g + 1 < kGroups) load(g + 1);  // it may have to wait for its chunk
  }
  load_scales(Cfg::kRingLatent - 1);
  load_value_group(pipe.bytes, values, 0);
  cute::warpgroup_wait<0>();
  add_products(smem, st, low, high, products[(Cfg::kRingLatent - 1) & 1], scores);
}

// The same where registers are short: one set of accumulators, fragments for two steps of k16 at a time, nothing loaded
// ahead.
template <class Cfg>
ETAP_DEVICE void score_latent_narrow(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st,
                                     E4m3Pipeline& pipe, LaneOffsets const& offsets, RingPosition<Cfg> at,
                                     float const* scales, float (&scores)[Cfg::kRowTile / 2]) {
  constexpr uint32_t kQueryChunk = Cfg::kRowTile * 128 / kDescriptorUnit, kStep = 32 / kDescriptorUnit;
  uint32_t const query = descriptor_low(shared_address(smem.query));
  cute::warpgroup_wait<0>();
  finish_rope(p, smem, st, at, scores);
  ETAP_ROLLED
  for (int c = 0; c < Cfg::kRingLatent; ++c) {
    at.advance();
    smem.control.full[at.slot].wait(at.parity);
    uint32_t const keys = chunk_address(smem, at) + offsets.keys;
    float products[Cfg::kRowTile / 2];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      Group& a = pipe.a[g & 1];
      load_matrices(pipe.bytes, 0, keys ^ (g * 32));
      if (g >= 2) cute::warpgroup_wait<1>();
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        widen(pipe.bytes[2 * j], a[j][0], a[j][2]);
        widen(pipe.bytes[2 * j + 1], a[j][1], a[j][3]);
      }
      cute::warpgroup_arrive();
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t const q = query + latent_chunk(2 * c + g / 2, st.group) * kQueryChunk + (g % 2 * 2 + j) * kStep;
        wgmma<Cfg::kRowTile>(a[j], descriptor(q), products, g + j == 0 ? ScaleOut::Zero : ScaleOut::One);
      }
      cute::warpgroup_commit_batch();
    }
    int const i = scale_group(c, st.group);
    float const low = scales[i], high = scales[8 * kScaleGroups + i];
    cute::warpgroup_wait<0>();
    add_products(smem, st, low, high, products, scores);
  }
}

// S^T of one tile, in log2 units.
template <class T, class Cfg>
ETAP_DEVICE void score_tile_groups(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st,
                                   E4m3Pipeline& pipe, LaneOffsets const& offsets, RingPosition<Cfg> at,
                                   ScalePosition scales_at, float (&scores)[Cfg::kRowTile / 2]) {
  float const* const scales =
      reinterpret_cast<float const*>(&smem.control.scales[scales_at.slot][st.warp * 16 + st.lane / 4]);
  score_rope<T>(p, smem, pipe, offsets, at, st.lane, scores);
  if (p.group_scale) smem.control.scales_full[scales_at.slot].wait(scales_at.parity);
  if constexpr (Cfg::kLoadsAhead) {
    score_latent(p, smem, st, pipe, offsets, at, scales, scores);
  } else {
    score_latent_narrow(p, smem, st, pipe, offsets, at, scales, scores);
  }
}

}  // namespace etap
