// The consumer warpgroups for an e4m3 cache where both work on every tile: consumer_wide.cuh with the tile widened in
// registers (consumer_e4m3.cuh). Each warpgroup takes every second latent chunk, for S^T and for O^T, and half of the
// rope chunk, so no byte is widened twice for one product.
#pragma once

#include "consumer_e4m3.cuh"
#include "consumer_wide.cuh"

namespace etap {

// S^T from the warpgroup's chunks, all rows; left in flight. Group 0 of the fragments is its half of the rope chunk,
// which meets two parts of Q; the others are the halves of its latent chunks.
template <class Cfg>
ETAP_DEVICE void score_own_chunks_e4m3(SharedStorage<Cfg>& smem, E4m3Pipeline& pipe, LaneOffsets const& offsets,
                                       RingPosition<Cfg> at, int group, int lane, float (&scores)[Cfg::kRowTile / 2]) {
  constexpr uint32_t kQueryChunk = Cfg::kRowTile * 128 / kDescriptorUnit, kStep = 32 / kDescriptorUnit;
  uint32_t const query = descriptor_low(shared_address(smem.query));
  uint32_t const rope_query = query + kLatentChunks * kQueryChunk + group * 2 * kStep;
  uint32_t keys = 0;
  auto const load = [&](int g) {
    if (g % 2 == 0) {
      at.advance(g == 0 ? 1 + group : 2);
      smem.control.full[at.slot].wait(at.parity);
      keys = chunk_address(smem, at) + offsets.keys;
    }
    load_key_group(pipe.bytes, keys, g % 2);
  };
  smem.control.full[at.slot].wait(at.parity);
  load_matrices(pipe.bytes, 0, (chunk_address(smem, at) + offsets.rope) ^ (group * 32));
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    widen(pipe.bytes[2 * j], pipe.a[0][j][0], pipe.a[0][j][2]);
    widen(pipe.bytes[2 * j + 1], pipe.a[0][j][1], pipe.a[0][j][3]);
  }
  __syncwarp();
  if (lane == 0) smem.control.empty[at.slot].arrive();  // all eight warps do
  cute::warpgroup_arrive();
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      wgmma<Cfg::kRowTile>(pipe.a[0][j], descriptor(rope_query + part * kQueryChunk + j * kStep), scores,
                           part + j == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
  }
  cute::warpgroup_commit_batch();
  load(0);
#pragma unroll
  for (int g = 0; g < Cfg::kOwnBlocks; ++g) {
    Group& a = pipe.a[(g + 1) & 1];
    if (g >= 1) cute::warpgroup_wait<1>();  // the group before last is done with its fragments
    widen_keys(pipe.bytes, a);
    if (g % 2 == 0) load(g + 1);
    uint32_t const q = query + (Cfg::own_block(0, g) + Cfg::kChunkBlocks * group) * kQueryChunk;
    cute::warpgroup_arrive();
#pragma unroll
    for (int j = 0; j < 4; ++j) wgmma<Cfg::kRowTile>(a[j], descriptor(q + j * kStep), scores, ScaleOut::One);
    cute::warpgroup_commit_batch();
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
  int lane;
  uint32_t bytes[2][8];
  Group a[2];

  ETAP_DEVICE void load(int c) {
    if (c % 2 == 0 && c > 0) at.advance(2);
    load_value_group(bytes[c % 2], chunk_address(smem, at) + offset, c % 2);
  }
  ETAP_DEVICE void widen(int c) {
    widen_values(bytes[c % 2], a[c % 2]);
    if (c % 2 == 1) release_chunk(smem, at, lane);
    if (c + 1 < Cfg::kOwnBlocks) load(c + 1);
  }
};

// One tile. `at`: its rope chunk. `meanwhile` is called behind the tile's last sums, with V^T P^T under way.
template <class Cfg, class Meanwhile>
ETAP_DEVICE void consume_tile_e4m3_wide(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                        E4m3Pipeline& pipe, LaneOffsets const& offsets, MaskBounds const& mask,
                                        RingPosition<Cfg> at, int tile, Meanwhile const& meanwhile) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
  ScaleOut const before = Cfg::kOverwrites && st.fresh ? ScaleOut::Zero : ScaleOut::One;
  float all[Cfg::kRowTile / 2], scores[Cfg::kScoreRows / 2];
  score_own_chunks_e4m3(smem, pipe, offsets, at, st.group, st.lane, all);
  int const end = (tile + 1) * kTileKeys;
  if (end > mask.len) {
    sync_group(st.group);
    clear_own_tail(smem, st, at, mask.len - tile * kTileKeys);
  }
  OwnValues<Cfg> values{smem, at.ahead(1 + st.group), offsets.values, st.lane};
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
  uint32_t const prob = descriptor_low(shared_address(smem.prob[0]));
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
        uint32_t const of_keys = prob + (part * Cfg::kRowTile * 128 + j * 32) / kDescriptorUnit;
        wgmma<Cfg::kPvRows>(values.a[c % 2][j], descriptor(of_keys), st.out[c], part + j == 0 ? before : ScaleOut::One);
      }
    }
    cute::warpgroup_commit_batch();
  }
  meanwhile();
  cute::warpgroup_wait<0>();
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
