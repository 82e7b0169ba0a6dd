// S^T over an e4m3 cache with scales for groups of latent columns: see consumer_groups.cuh.
#pragma once

#include "consumer_e4m3_wide.cuh"

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

// Keeps a use of wgmma's results behind the wait for them.
template <int N>
ETAP_DEVICE void fence_results(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(d[i]);
}

// Brings the rope chunk's products to log2 units.
template <class Cfg>
ETAP_DEVICE void scale_rope(MlaDecodeParams const& p, SharedStorage<Cfg> const& smem, ConsumerState<Cfg> const& st,
                            float (&scores)[Cfg::kRowTile / 2]) {
  fence_results(scores);
#pragma unroll
  for (int j = 0; j < Cfg::kRowTile / 8; ++j) {
    float2 factor = make_float2(p.scale_log2, p.scale_log2);
    if constexpr (!Cfg::kRope16) factor = row_pair<Cfg>(smem.control.rope_scale, st, j);
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[4 * j + i] *= i % 2 ? factor.y : factor.x;
  }
}

// What a thread multiplies a chunk's products by: its two keys' scales, and the rows' factors.
template <class Cfg>
struct ProductFactors {
  float keys[2];
  float2 rows[Cfg::kRowTile / 8];

  ETAP_DEVICE ProductFactors(SharedStorage<Cfg> const& smem, ConsumerState<Cfg> const& st, float4 const* scales,
                             int chunk) {
    auto const* const own = reinterpret_cast<float const*>(scales + st.warp * 16 + st.lane / 4) + chunk;
    keys[0] = own[0];
    keys[1] = own[8 * kScaleGroups];
#pragma unroll
    for (int j = 0; j < Cfg::kRowTile / 8; ++j) rows[j] = row_pair<Cfg>(smem.control.row_scale, st, j);
  }
  // Adds the products, times these, to the scores.
  ETAP_DEVICE void add(float (&products)[Cfg::kRowTile / 2], float (&scores)[Cfg::kRowTile / 2]) const {
    fence_results(products);
#pragma unroll
    for (int i = 0; i < Cfg::kRowTile / 2; ++i) {
      float2 const row = rows[i / 4];
      scores[i] = fmaf(products[i], keys[i / 2 % 2] * (i % 2 ? row.y : row.x), scores[i]);
    }
  }
};

// S^T of one tile from the warpgroup's chunks, all rows, in log2 units. A chunk is added up while wgmma works on the
// next. `behind` is called with the last one's products under way, its bytes in registers.
template <class T, class Cfg, class Behind>
ETAP_DEVICE void score_own_groups(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st,
                                  E4m3Pipeline& pipe, LaneOffsets const& offsets, RingPosition<Cfg> at,
                                  ScalePosition scales_at, float (&scores)[Cfg::kRowTile / 2], Behind const& behind) {
  constexpr uint32_t kStep = 32 / kDescriptorUnit;
  float4 const* const scales = smem.control.scales[scales_at.slot];
  float products[2][Cfg::kRowTile / 2];  // of the warpgroup's chunks
  score_own_rope<T>(p, smem, pipe, offsets, at, st.group, scores);
  walk_own_keys(smem, pipe, offsets, at, st.group, [&](int g, Group const& a, uint32_t query) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<__half, Cfg::kRowTile>(a[j], descriptor(query + j * kStep), products[g / 2],
                           g % 2 + j == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
    cute::warpgroup_commit_batch();
    if (g == 1) {  // the rope chunk's products are there
      if constexpr (Cfg::kRope16) free_rope(smem, at.slot);
      scale_rope(p, smem, st, scores);
    } else if (g == 3) {  // those of the first chunk
      if (p.group_scale) smem.control.scales_full[scales_at.slot].wait(scales_at.parity);
      ProductFactors<Cfg>(smem, st, scales, st.group).add(products[0], scores);
    }
  });
  behind();
  cute::warpgroup_wait<0>();
  ProductFactors<Cfg>(smem, st, scales, st.group + 2).add(products[1], scores);
}

}  // namespace etap
