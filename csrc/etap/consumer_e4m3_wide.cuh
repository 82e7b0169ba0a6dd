// The consumer warpgroups for an e4m3 cache where both work on every tile: consumer_wide.cuh with the tile widened in
// registers (consumer_e4m3.cuh). Each warpgroup takes every second latent chunk, for S^T and for O^T, and half of the
// rope chunk, so no byte is widened twice for one product.
#pragma once

#include "consumer_e4m3.cuh"
#include "consumer_wide.cuh"

namespace etap {

// The warpgroup's half of the rope chunk's columns, all rows; left in flight. Q's rope part is in one part, or in two.
template <class T, class Cfg>
ETAP_DEVICE void score_own_rope(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, E4m3Pipeline& pipe,
                                LaneOffsets const& offsets, RingPosition<Cfg> at, int group,
                                float (&scores)[Cfg::kRowTile / 2]) {
  constexpr uint32_t kQueryChunk = Cfg::kRowTile * 128 / kDescriptorUnit, kStep = 32 / kDescriptorUnit;
  uint32_t const half = group * 2 * kStep, keys = chunk_address(smem, at);
  uint32_t const query = descriptor_low(shared_address(smem.query[kLatentChunks])) + half;
  smem.control.full[at.slot].wait(at.parity);
  if constexpr (Cfg::kRope16) {
    if (p.box_rows == 0) cutlass::arch::fence_view_async_shared();  // cp.async writes through the generic proxy
    cute::warpgroup_arrive();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      wgmma<T, Cfg::kRowTile, Major::K>(descriptor(descriptor_low(keys) + half + j * kStep),
                                        descriptor(query + j * kStep), scores, j == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
  } else {
    load_matrices(pipe.bytes, 0, (keys + offsets.rope) ^ (group * 32));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      widen(pipe.bytes[2 * j], pipe.a[0][j][0], pipe.a[0][j][2]);
      widen(pipe.bytes[2 * j + 1], pipe.a[0][j][1], pipe.a[0][j][3]);
    }
    free_rope(smem, at.slot);
    cute::warpgroup_arrive();
#pragma unroll
    for (int part = 0; part < Cfg::kQueryChunks - kLatentChunks; ++part) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        wgmma<__half, Cfg::kRowTile>(pipe.a[0][j], descriptor(query + part * kQueryChunk + j * kStep), scores,
                             part + j == 0 ? ScaleOut::Zero : ScaleOut::One);
      }
    }
  }
  cute::warpgroup_commit_batch();
}

// The warpgroup's latent chunks of K, 64 columns at a time, behind score_own_rope: multiply(g, a, q) puts the wgmmas of
// fragments a on their way, with the columns of Q from descriptor q on.
template <class Cfg, class Multiply>
ETAP_DEVICE void walk_own_keys(SharedStorage<Cfg>& smem, E4m3Pipeline& pipe, LaneOffsets const& offsets,
                               RingPosition<Cfg> at, int group, Multiply const& multiply) {
  constexpr uint32_t kQueryChunk = Cfg::kRowTile * 128 / kDescriptorUnit;
  uint32_t const query = descriptor_low(shared_address(smem.query)) + Cfg::kChunkBlocks * group * kQueryChunk;
  uint32_t keys = 0;
  auto const load = [&](int g) {
    if (g % 2 == 0) {
      at.advance(g == 0 ? 1 + group : 2);
      smem.control.full[at.slot].wait(at.parity);
      keys = chunk_address(smem, at) + offsets.keys;
    }
    load_key_group(pipe.bytes, keys, g % 2);
  };
  load(0);
#pragma unroll
  for (int g = 0; g < Cfg::kOwnBlocks; ++g) {
    Group& a = pipe.a[(g + 1) & 1];
    if (g >= 1) cute::warpgroup_wait<1>();  // the group before last is done with its fragments
    widen_keys(pipe.bytes, a);
    if (g % 2 == 0) load(g + 1);
    cute::warpgroup_arrive();
    multiply(g, a, query + Cfg::own_block(0, g) * kQueryChunk);
    if (g % 2 == 1 && g + 1 < Cfg::kOwnBlocks) load(g + 1);  // it may have to wait for its chunk
  }
}

// The warpgroup's values, from bytes to fragments, block by block; frees the chunks behind them. Two blocks are widened
// beside the softmax; more gained nothing.
template <class Cfg>
struct OwnValues {
  SharedStorage<Cfg>& smem;
  RingPosition<Cfg> at;  // of the block loaded last
  uint32_t offset;
  uint32_t bytes[2][8];
  Group a[2];

  ETAP_DEVICE void load(int c) {
    if (c % 2 == 0 && c > 0) at.advance(2);
    load_value_group(bytes[c % 2], chunk_address(smem, at) + offset, c % 2);
  }
  ETAP_DEVICE void widen(int c) {
    widen_values(bytes[c % 2], a[c % 2]);
    if (c % 2 == 1) free_latent(smem, at.slot);
    if (c + 1 < Cfg::kOwnBlocks) load(c + 1);
  }
};

// O^T += V^T P^T for the warpgroup's blocks, of which two are widened. `before`, `meanwhile`: see accumulate_tile. Of
// P^T's versions, where there are several, each chunk takes its own.
template <class Cfg, class Meanwhile>
ETAP_DEVICE void accumulate_own_values(SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st, OwnValues<Cfg>& values,
                                       ScaleOut before, Meanwhile const& meanwhile) {
  uint32_t const prob = descriptor_low(shared_address(smem.prob[0])) +
                        (Cfg::kProbVersions > 1 ? st.group * Cfg::kProbBytes / kDescriptorUnit : 0);
#pragma unroll
  for (int c = 0; c < Cfg::kOwnBlocks; ++c) {
    if (c >= 2) {
      cute::warpgroup_wait<1>();  // the block before last is done with its fragments
      values.widen(c);
    }
    cute::warpgroup_arrive();
#pragma unroll
    for (int part = 0; part < (Cfg::kConcatP ? 1 : Cfg::kPParts); ++part) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t const version = Cfg::own_block(0, c) / Cfg::kChunkBlocks % Cfg::kProbVersions;
        uint32_t const from = version * Cfg::kProbBytes + part * Cfg::kRowTile * 128 + j * 32;
        wgmma<__half, Cfg::kPvRows>(values.a[c % 2][j], descriptor(prob + from / kDescriptorUnit), st.out[c],
                            part + j == 0 ? before : ScaleOut::One);
      }
    }
    cute::warpgroup_commit_batch();
  }
  meanwhile();
  cute::warpgroup_wait<0>();
}

// One tile. `at`: its rope chunk. `meanwhile` is called behind the tile's last sums, with V^T P^T under way.
template <class Cfg, class Meanwhile>
ETAP_DEVICE void consume_tile_e4m3_wide(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                        E4m3Pipeline& pipe, LaneOffsets const& offsets, MaskBounds const& mask,
                                        RingPosition<Cfg> at, int tile, Meanwhile const& meanwhile) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
  constexpr uint32_t kStep = 32 / kDescriptorUnit;
  ScaleOut const before = Cfg::kOverwrites && st.fresh ? ScaleOut::Zero : ScaleOut::One;
  float all[Cfg::kRowTile / 2], scores[Cfg::kScoreRows / 2];
  score_own_rope<__half>(p, smem, pipe, offsets, at, st.group, all);
  walk_own_keys(smem, pipe, offsets, at, st.group, [&](int, Group const& a, uint32_t query) {
#pragma unroll
    for (int j = 0; j < 4; ++j) wgmma<__half, Cfg::kRowTile>(a[j], descriptor(query + j * kStep), all, ScaleOut::One);
    cute::warpgroup_commit_batch();
  });
  int const end = (tile + 1) * kTileKeys;
  if (end > mask.len) {
    sync_group(st.group);
    clear_own_tail(smem, st, at, mask.len - tile * kTileKeys);
  }
  OwnValues<Cfg> values{smem, at.ahead(1 + st.group), offsets.values};
  values.load(0);
  cute::warpgroup_wait<0>();
  trace(kScored, st.fresh && st.group + st.warp + st.lane == 0);
  exchange_scores(smem, st, all, scores, [&] {
    values.widen(0);
    values.widen(1);
  });
#pragma unroll
  for (int i = 0; i < kStats; ++i) {
    float const scale = smem.control.row_scale[st.first_row() + st.row_of(i)];
    scores[4 * (i / 2) + (i & 1)] *= scale;
    scores[4 * (i / 2) + 2 + (i & 1)] *= scale;
  }
  if (end > mask.len || (p.causal && end > mask.causal_gap + 1)) mask_scores(p, mask, st, tile, scores);
  write_all_probabilities<__half>(p, smem, st, scores);
  accumulate_own_values(smem, st, values, before, meanwhile);
}

// All tiles of a piece; last_one() is called while the last one's V^T P^T is under way.
template <class Cfg, class LastOne>
ETAP_DEVICE void consume_tiles_e4m3_wide(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                         MaskBounds const& mask, PieceInfo const& piece, LastOne const& last_one) {
  int const begin = piece.begin, tiles = piece.end - begin, chunk = piece.first_chunk;
  LaneOffsets const offsets(st.warp, st.lane);
  E4m3Pipeline pipe;
  ETAP_ROLLED
  for (int i = 0; i < tiles; ++i) {
    auto const at = RingPosition<Cfg>::at(chunk + i * Cfg::kRingTile);
    consume_tile_e4m3_wide(p, smem, st, pipe, offsets, mask, at, begin + i, [&] {
      if (i + 1 == tiles) last_one();
    });
  }
}

}  // namespace etap
