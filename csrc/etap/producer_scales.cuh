// Scales for groups of latent columns on their way to shared memory, a tile at a time.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "plan.cuh"

namespace etap {

// The four scales of one key.
ETAP_DEVICE void copy_scales(MlaDecodeParams const& p, KeyPlace place, float4& to) {
  float const* const from =
      p.group_scale + place.page * p.group_scale_page_stride + place.row * p.group_scale_row_stride;
  if (p.group_scale_16b) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL<float4>::copy(*reinterpret_cast<float4 const*>(from), to);
  } else {
#pragma unroll
    for (int i = 0; i < kScaleGroups; ++i) {
      cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(from[i], reinterpret_cast<float*>(&to)[i]);
    }
  }
}

// Beside TMA, one warp loads the scales of all pieces. The copies arrive at the barrier by themselves, as the gathers'.
template <class Cfg>
ETAP_DEVICE void load_piece_scales(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, PieceInfo const& piece,
                                   int lane) {
  int const request = piece.request, len = piece.len, begin = piece.begin, end = piece.end;
  int const* const pages = piece.pages;
  KeyPlace next[2] = {{0, -1}, {0, -1}};
  ETAP_ROLLED
  for (int tile = begin - 1; tile < end; ++tile) {  // one tile of look-ups ahead
    KeyPlace place[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      place[i] = next[i];
      int const key = (tile + 1) * kTileKeys + lane + 32 * i;
      next[i] = key < len && tile + 1 < end ? locate_key(p, request, pages, key) : KeyPlace{0, -1};  // row < 0: no key
    }
    if (tile < begin) continue;
    auto const at = ScalePosition::at(first_tile(smem, piece) + tile - begin);
    smem.control.scales_empty[at.slot].wait(at.parity ^ 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (place[i].row >= 0) copy_scales(p, place[i], smem.control.scales[at.slot][lane + 32 * i]);
    }
    cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t*>(&smem.control.scales_full[at.slot]));
  }
}

template <class Cfg>
ETAP_DEVICE void produce_scales(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int lane) {
  ETAP_ROLLED
  for (int index = 0;; ++index) {
    PieceInfo const& piece = await_piece(smem, index);
    if (piece.request < 0) break;
    load_piece_scales(p, smem, piece, lane);
    release_piece(smem, index);
  }
}

// In a gather, 64 of the threads take one key each. All 128 call this for the n-th tile since launch; `row` < 0: no
// key, or none of this thread's.
template <class Cfg>
ETAP_DEVICE void gather_scales(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, KeyPlace place, int key,
                               int n) {
  auto const at = ScalePosition::at(n);
  smem.control.scales_empty[at.slot].wait(at.parity ^ 1);
  if (place.row >= 0) copy_scales(p, place, smem.control.scales[at.slot][key]);
  cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t*>(&smem.control.scales_full[at.slot]));
}

}  // namespace etap
