// The ring filled through cp.async gathers, where pages are too small for TMA, or element by element.
#pragma once

#include <type_traits>

#include "producer_scales.cuh"

namespace etap {

// What the gathers take an element of the cache for.
template <class Cfg>
using CacheElement = std::conditional_t<Cfg::kE4m3, uint8_t, uint16_t>;

// Byte offset of 16-byte column `col16` of row `row` in the rope chunk, as TMA would have put it.
template <class Cfg>
ETAP_DEVICE uint32_t rope_offset(uint32_t row, uint32_t col16) {
  return Cfg::kRopeRowBytes == 64 ? row * 64 + ((col16 ^ (row >> 1 & 3)) << 4) : swizzled(row, col16);
}

// Brings the page table's entries of a tile to L2, from two threads on. They come from HBM, and are looked up only one
// tile before they are used.
ETAP_DEVICE void prefetch_entries(MlaDecodeParams const& p, int const* pages, int len, int tile, int thread) {
  int const key = tile * kTileKeys + thread * 32;
  if (p.page_table && key < len) prefetch_l2(pages + p.page_divmod.divide(key));
}

// Four 16-byte copies of a thread, of rows 16 apart, to `to` and `step` bytes further on each.
template <bool EvictFirst, int Rows>
ETAP_DEVICE void copy_rows(uint32_t to, uint32_t step, void const* const (&from)[Rows], bool const (&there)[Rows]) {
#pragma unroll
  for (int i = 0; i < Rows; ++i) {
    if (!there[i]) continue;
    if constexpr (EvictFirst) {
      copy_16b(to + i * step, from[i], kEvictFirst);
    } else {
      copy_16b(to + i * step, from[i]);
    }
  }
}

// cp.async, 16 bytes a thread: neighbouring threads share a row's 128 bytes. The copies themselves arrive at the full
// barrier; the consumers fence between the proxies. Instructions here are the limit of long launches on an H200: so the
// hint, which costs some, has a copy of its own.
template <bool EvictFirst, class Cfg>
ETAP_DEVICE void load_piece_gather(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, PieceInfo const& piece,
                                   RingPosition<Cfg>& at, int thread) {
  using Element = CacheElement<Cfg>;
  constexpr int kRows = 4;  // rows of a tile that one thread copies 16 bytes of, per chunk
  constexpr int kVector = 16 / sizeof(Element);
  int const col16 = thread % 8, first_row = thread / 8;
  int const request = piece.request, len = piece.len, end = piece.end;
  int const* const pages = piece.pages;
  uint32_t ring = shared_address(smem.ring);
  keep(ring);  // else it is worked out again for each copy
  constexpr int kTilesAhead = 16;  // of the page table
  if (thread < 2 * kTilesAhead) prefetch_entries(p, pages, len, piece.begin, thread);
  auto const load_chunk = [&](uint32_t offset, uint32_t step, void const* const(&from)[kRows],
                              bool const(&there)[kRows]) {
    smem.control.empty[at.slot].wait(at.parity ^ 1);
    copy_rows<EvictFirst>(ring + at.slot * kChunkBytes + offset, step, from, there);
    cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t*>(&smem.control.full[at.slot]));
    at.advance();
  };
  KeyPlace next[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) next[i] = {0, -1};
  ETAP_ROLLED
  for (int tile = piece.begin - 1; tile < end; ++tile) {  // one tile of look-ups ahead
    void const* from[kRows];
    bool there[kRows];
    KeyPlace place[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      place[i] = next[i];
      from[i] = static_cast<Element const*>(p.kpe) + place[i].page * p.kpe_page_stride +
                place[i].row * p.kpe_row_stride + col16 * kVector;
      there[i] = place[i].row >= 0 && col16 * 16 < Cfg::kRopeRowBytes;
      int const key = (tile + 1) * kTileKeys + first_row + 16 * i;
      next[i] = key < len && tile + 1 < end ? locate_key(p, request, pages, key) : KeyPlace{0, -1};  // row < 0: no key
    }
    if (tile < piece.begin) continue;
    if constexpr (Cfg::kGroups) {
      KeyPlace own = place[0];
#pragma unroll
      for (int i = 1; i < kRows; ++i) own = col16 == i ? place[i] : own;
      if (col16 >= kRows) own.row = -1;
      int const n = first_tile(smem, piece) + tile - piece.begin;
      if (p.group_scale) gather_scales(p, smem, own, first_row + 16 * col16, n);
    }
    if (thread < 2) prefetch_entries(p, pages, len, tile + kTilesAhead, thread);
    load_chunk(rope_offset<Cfg>(first_row, col16), 16 * Cfg::kRopeRowBytes, from, there);  // the swizzle repeats
    int const first_col = Cfg::latent_column(0, (tile - piece.begin) & 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      from[i] = static_cast<Element const*>(p.ckv) + place[i].page * p.ckv_page_stride +
                place[i].row * p.ckv_row_stride + col16 * kVector + first_col;
      there[i] = place[i].row >= 0;
    }
    int const wrap = first_col ? 128 - kLatentDim * int(sizeof(Element)) : 128;  // after half of them, to the first
    ETAP_ROLLED
    for (int chunk = 0; chunk < Cfg::kRingLatent; ++chunk) {
      load_chunk(swizzled(first_row, col16), 16 * 128, from, there);
      int const on = chunk == Cfg::kRingLatent / 2 - 1 ? wrap : 128;
#pragma unroll
      for (int i = 0; i < kRows; ++i) from[i] = static_cast<uint8_t const*>(from[i]) + on;
    }
  }
}

// Rows that are not 16-byte aligned: element by element, through registers.
template <class Cfg>
ETAP_DEVICE void load_piece_elements(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, PieceInfo const& piece,
                                     RingPosition<Cfg>& at, int thread) {
  using Element = CacheElement<Cfg>;
  constexpr int kVector = 16 / sizeof(Element);
  int const col16 = thread % 8;
  ETAP_ROLLED
  for (int step = piece.begin * Cfg::kRingTile; step < piece.end * Cfg::kRingTile; ++step) {
    int const tile = step / Cfg::kRingTile, chunk = step % Cfg::kRingTile - 1;
    bool const rope = Cfg::kRopeRowBytes == 64 && chunk < 0;
    if constexpr (Cfg::kGroups) {
      if (chunk < 0 && p.group_scale) {
        int const key = tile * kTileKeys + thread;
        bool const loads = thread < kTileKeys && key < piece.len;
        KeyPlace const place = loads ? locate_key(p, piece.request, piece.pages, key) : KeyPlace{0, -1};
        gather_scales(p, smem, place, thread, first_tile(smem, piece) + tile - piece.begin);
      }
    }
    smem.control.empty[at.slot].wait(at.parity ^ 1);
    ETAP_ROLLED
    for (int row = thread / 8; row < min(kTileKeys, piece.len - tile * kTileKeys); row += 16) {
      KeyPlace const place = locate_key(p, piece.request, piece.pages, tile * kTileKeys + row);
      Element const* from = chunk < 0 ? static_cast<Element const*>(p.kpe) + place.page * p.kpe_page_stride +
                                            place.row * p.kpe_row_stride
                                      : static_cast<Element const*>(p.ckv) + place.page * p.ckv_page_stride +
                                            place.row * p.ckv_row_stride +
                                            Cfg::latent_column(chunk, (tile - piece.begin) & 1);
      if (rope && col16 >= 4) break;
      Element* to = reinterpret_cast<Element*>(smem.ring[at.slot] +
                                               (rope ? rope_offset<Cfg>(row, col16) : swizzled(row, col16)));
      for (int i = 0; i < kVector; ++i) to[i] = __ldg(from + col16 * kVector + i);
    }
    smem.control.full[at.slot].arrive();
    at.advance();
  }
}

}  // namespace etap
