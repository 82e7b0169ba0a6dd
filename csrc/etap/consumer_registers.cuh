// A warpgroup's own tiles where K and V come to wgmma through registers; the rest is as in consumer.cuh.
//
// A chunk is free as soon as its V is in registers, before wgmma has run; and the emulated H20, which issues each
// instruction up to four times, reads shared memory once for all. Two chunks' fragments take turns: while wgmma works
// on one, the next is on its way.
#pragma once

#include "consumer.cuh"

namespace etap {

// S^T of one tile; the ring keeps the latent chunks.
template <class T, class Cfg>
ETAP_DEVICE void score_tile_from_registers(SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st, RingPosition<Cfg> at,
                                           float (&scores)[Cfg::kRowTile / 2]) {
  constexpr uint32_t kQueryChunk = Cfg::kRowTile * 128 / kDescriptorUnit, kStep = 32 / kDescriptorUnit;
  uint32_t const query = descriptor_low(shared_address(smem.query));
  // A lane gives the address of a row of the matrix lane / 8: the warp's keys 0 to 7, 8 to 15, and the next 8 columns.
  uint32_t const keys = shared_address(smem.ring) + swizzled(st.warp * 16 + (st.lane & 15), st.lane >> 4);
  Group a[2];
  auto const load = [&](Group& to) {
    smem.control.full[at.slot].wait(at.parity);
#pragma unroll
    for (int j = 0; j < 4; ++j) load_matrices(to[j], 0, (keys + at.slot * kChunkBytes) ^ (j * 32));
    at.advance();
  };
  load(a[0]);
#pragma unroll
  for (int c = 0; c < kTileChunks; ++c) {
    uint32_t const q = query + (c == 0 ? kLatentChunks : latent_chunk(c - 1, st.group)) * kQueryChunk;
    cute::warpgroup_arrive();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<T, Cfg::kRowTile>(a[c & 1][j], descriptor(q + j * kStep), scores,
                              c + j == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
    cute::warpgroup_commit_batch();
    if (c + 1 == kTileChunks) break;
    if (c > 0) cute::warpgroup_wait<1>();  // the chunk before is done with its fragments
    load(a[(c + 1) & 1]);
  }
  cute::warpgroup_wait<0>();
}

// V^T of the next chunk, which is free then.
template <class Cfg>
ETAP_DEVICE void take_values(SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st, RingPosition<Cfg>& at, Group& to) {
  // As above: the warp's latent columns 0 to 7, 8 to 15, of 8 keys, and of the next 8.
  uint32_t const row = (st.lane >> 4) * 8 + (st.lane & 7), column = 2 * st.warp + (st.lane >> 3 & 1);
  uint32_t const values = shared_address(smem.ring) + swizzled(row, column) + at.slot * kChunkBytes;
#pragma unroll
  for (int j = 0; j < 4; ++j) load_matrices_transposed(to[j], 0, values + j * 16 * 128);
  free_latent(smem, at.slot);
  at.advance();
}

// O^T += V^T P^T. `a[0]`: the first chunk's fragments; `at`: the second.
template <class T, class Cfg>
ETAP_DEVICE void accumulate_tile_from_registers(SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st, RingPosition<Cfg> at,
                                                uint32_t prob, Group (&a)[2]) {
  uint32_t const p_low = descriptor_low(prob);
#pragma unroll
  for (int c = 0; c < kLatentChunks; ++c) {
    cute::warpgroup_arrive();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<T, Cfg::kRowTile>(a[c & 1][j], descriptor(p_low + j * (32 / kDescriptorUnit)), st.out[c], ScaleOut::One);
    }
    cute::warpgroup_commit_batch();
    if (c + 1 == kLatentChunks) break;
    if (c > 0) cute::warpgroup_wait<1>();
    take_values(smem, st, at, a[(c + 1) & 1]);
  }
  cute::warpgroup_wait<0>();
}

// One tile. `buffer` alternates per tile.
template <class T, class Cfg>
ETAP_DEVICE void consume_tile_from_registers(MlaDecodeParams const& p, SharedStorage<Cfg>& smem,
                                             ConsumerState<Cfg>& st, MaskBounds const& mask, RingPosition<Cfg> at,
                                             int tile, int buffer) {
  constexpr bool kEarly = Cfg::kRowTile < 32;  // V's first fragments are on their way during softmax; else spilled
  float scores[Cfg::kRowTile / 2];
  await_previous_pass(smem, at.ahead(Cfg::kForeignFirst), Cfg::kForeignChunks, st.lane);
  score_tile_from_registers<T>(smem, st, at, scores);
  trace(kScored, st.fresh && st.group + st.warp + st.lane == 0);
  free_rope(smem, at.slot);
  mask_tile(p, smem, st, mask, at, tile, scores, [&] { sync_group(st.group); });
  Group values[2];
  at.advance();
  if constexpr (kEarly) take_values(smem, st, at, values[0]);
  uint32_t const prob = shared_address(smem.prob[2 * st.group + buffer]);
  write_own_probabilities<T>(p, smem, st, prob, scores);
  if constexpr (!kEarly) take_values(smem, st, at, values[0]);
  accumulate_tile_from_registers<T>(smem, st, at, prob, values);
}

}  // namespace etap
