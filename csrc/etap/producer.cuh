// The producer warpgroup: hands out the pieces and fills the ring, chunk by chunk, through TMA or cp.async gathers.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include <type_traits>

#include "plan.cuh"

namespace etap {

// Lends ring chunks to the consumers at the end of a piece, for the exchange; nothing is loaded into them.
template <class Cfg>
ETAP_DEVICE void lend_chunks(SharedStorage<Cfg>& smem, RingPosition<Cfg>& at, Piece const& piece, bool arrives) {
  ETAP_ROLLED
  for (int i = lent_chunks<Cfg>(piece); i > 0; --i) {
    smem.control.empty[at.slot].wait(at.parity ^ 1);
    if (arrives) smem.control.full[at.slot].arrive();
    at.advance();
  }
}

// Where a run of keys lies: page and row in it.
struct KeyPlace {
  int page, row;
};

ETAP_DEVICE KeyPlace locate_key(MlaDecodeParams const& p, int request, int const* pages, int key) {
  if (!p.page_table) return {p.cache_batch_idx ? p.cache_batch_idx[request] : request, key};
  int entry, row;
  p.page_divmod(entry, row, key);
  return {__ldg(pages + entry), row};
}

// TMA: lane i looks up the i-th box of a round of boxes.
struct BoxLane {
  int log_boxes;   // per tile: 1, 2, 4 or 8 boxes
  int tile, row;   // of the lane's box: tile of the round, row of the tile

  ETAP_DEVICE BoxLane(MlaDecodeParams const& p, int lane) {
    int log_rows = 31 - __clz(p.box_rows);
    keep(log_rows);  // else what follows from it is kept from piece to piece, and other things spilled
    log_boxes = 31 - __clz(kTileKeys) - log_rows;
    tile = lane >> log_boxes;
    row = (lane & ((1 << log_boxes) - 1)) << log_rows;
  }
  // The lane's box in the round that begins with tile `first`. Boxes past the length get a row past the page, for which
  // TMA writes zeros without reading.
  ETAP_DEVICE KeyPlace look_up(MlaDecodeParams const& p, int request, int const* pages, int len, int first) const {
    int const key = (first + tile) * kTileKeys + row;
    return key < len ? locate_key(p, request, pages, key) : KeyPlace{0, p.page_size};
  }
};

constexpr int kShortPiece = 8;  // tiles

// Where a ring of two tiles or more feeds a long piece, a tile's copies wait for all of its slots and go out together:
// memory then has whole rows of the cache to read, not pieces of 128 bytes (0.2% of a long launch, 1% with 32 rows and
// with e4m3, measured; a short one needs each copy as soon as there is room for it).
template <class Cfg>
ETAP_DEVICE void await_slots(SharedStorage<Cfg>& smem, RingPosition<Cfg> const& at) {
  static_assert(Cfg::kWide);
#pragma unroll
  for (int i = Cfg::kRingTile - 2; i < Cfg::kRingTile; ++i) {  // the last that each warpgroup frees
    RingPosition<Cfg> const last = at.ahead(i);
    smem.control.empty[last.slot].wait(last.parity ^ 1);
  }
}

// What a chunk costs here, from the wait to the copy, delays every refill of the ring: a longer loop was 18% slower at
// 64K keys on the emulated H20. `next`: of the first round.
template <class Cfg>
ETAP_DEVICE void load_piece_tma(MlaDecodeParams const& p, CUtensorMap const& ckv_map, CUtensorMap const& kpe_map,
                                SharedStorage<Cfg>& smem, PieceInfo const& piece, KeyPlace next, RingPosition<Cfg>& at,
                                int lane) {
  constexpr uint64_t kHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  BoxLane const own(p, lane);
  int const boxes = 1 << own.log_boxes, tiles_per_round = 32 >> own.log_boxes;
  int const begin = piece.begin, end = piece.end, len = piece.len, request = piece.request;
  int const* const pages = piece.pages;
  ETAP_ROLLED
  for (int first = begin; first < end; first += tiles_per_round) {
    KeyPlace const box = next;
    trace(kLookedUp, first == begin && at.slot + at.parity == 0 && lane == 0);
    int const count = min(tiles_per_round, end - first);
    ETAP_ROLLED
    for (int tile = 0; tile < count; ++tile) {
      // Behind the first copies; a round has 4 tiles or more.
      if (tile == 1) next = own.look_up(p, request, pages, len, first + tiles_per_round);
      if constexpr (Cfg::kTogether) {
        if (end - begin > kShortPiece) await_slots(smem, at);
      }
      if (boxes == 1) {
        int const row = __shfl_sync(~0u, box.row, tile), page = __shfl_sync(~0u, box.page, tile);
        if (cute::elect_one_sync()) {
          RingPosition<Cfg> to = at;
          int const flip = Cfg::latent_column(0, (first + tile - begin) & 1);
#pragma unroll
          for (int chunk = -1; chunk < Cfg::kRingLatent; ++chunk) {
            smem.control.empty[to.slot].wait(to.parity ^ 1);
            smem.control.full[to.slot].arrive_and_expect_tx(chunk < 0 ? Cfg::kRopeBytes : kChunkBytes);
            cute::SM90_TMA_LOAD_3D::copy(chunk < 0 ? &kpe_map : &ckv_map,
                                         reinterpret_cast<uint64_t*>(&smem.control.full[to.slot]), kHint,
                                         smem.ring[to.slot], chunk < 0 ? 0 : Cfg::latent_column(chunk, 0) ^ flip, row,
                                         page);
            to.advance();
          }
        }
        __syncwarp();
        at.advance(Cfg::kRingTile);
        continue;
      }
      ETAP_ROLLED
      for (int chunk = -1; chunk < Cfg::kRingLatent; ++chunk) {
        smem.control.empty[at.slot].wait(at.parity ^ 1);
        if (lane == tile * boxes) {
          smem.control.full[at.slot].arrive_and_expect_tx(chunk < 0 ? Cfg::kRopeBytes : kChunkBytes);
        }
        __syncwarp();
        if (own.tile == tile) {
          cute::SM90_TMA_LOAD_3D::copy(chunk < 0 ? &kpe_map : &ckv_map,
                                       reinterpret_cast<uint64_t*>(&smem.control.full[at.slot]), kHint,
                                       smem.ring[at.slot] + own.row * (chunk < 0 ? Cfg::kRopeRowBytes : 128),
                                       chunk < 0 ? 0 : Cfg::latent_column(chunk, (first + tile - begin) & 1), box.row,
                                       box.page);
        }
        at.advance();
      }
    }
  }
}

// What the gathers take an element of the cache for.
template <class Cfg>
using CacheElement = std::conditional_t<Cfg::kE4m3, uint8_t, uint16_t>;

// Byte offset of 16-byte column `col16` of row `row` in the rope chunk, as TMA would have put it.
template <class Cfg>
ETAP_DEVICE uint32_t rope_offset(uint32_t row, uint32_t col16) {
  return Cfg::kRopeRowBytes == 64 ? row * 64 + ((col16 ^ (row >> 1 & 3)) << 4) : swizzled(row, col16);
}

// ---- scales for groups of latent columns, a tile at a time

// The four of one key.
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
    release_piece(smem, index, lane);
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

// ---- gathers

// Brings the page table's entries of a tile to L2, from two threads on. They come from HBM, and are looked up only one
// tile before they are used.
ETAP_DEVICE void prefetch_entries(MlaDecodeParams const& p, int const* pages, int len, int tile, int thread) {
  int const key = tile * kTileKeys + thread * 32;
  if (p.page_table && key < len) prefetch_l2(pages + p.page_divmod.divide(key));
}

// cp.async, 16 bytes a thread: neighbouring threads share a row's 128 bytes. The copies themselves arrive at the full
// barrier; the consumers fence between the proxies.
template <class Cfg>
ETAP_DEVICE void load_piece_gather(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, PieceInfo const& piece,
                                   RingPosition<Cfg>& at, int thread) {
  using Element = CacheElement<Cfg>;
  constexpr int kRows = 4;  // rows of a tile that one thread copies 16 bytes of, per chunk
  constexpr int kVector = 16 / sizeof(Element);
  int const col16 = thread % 8, first_row = thread / 8;
  int const request = piece.request, len = piece.len, end = piece.end;
  int const* const pages = piece.pages;
  constexpr int kTilesAhead = 16;  // of the page table
  if (thread < 2 * kTilesAhead) prefetch_entries(p, pages, len, piece.begin, thread);
  KeyPlace next[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) next[i] = {0, -1};
  ETAP_ROLLED
  for (int tile = piece.begin - 1; tile < end; ++tile) {  // one tile of look-ups ahead
    Element const* from[kRows];
    KeyPlace place[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      place[i] = next[i];
      from[i] = static_cast<Element const*>(p.kpe) + place[i].page * p.kpe_page_stride +
                place[i].row * p.kpe_row_stride + col16 * kVector;
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
    int const first_col = Cfg::latent_column(0, (tile - piece.begin) & 1);
    int const wrap = first_col ? Cfg::kRingCols - kLatentDim : Cfg::kRingCols;  // after half of them, back to the first
    if (thread < 2) prefetch_entries(p, pages, len, tile + kTilesAhead, thread);
    int lane_col16 = col16;
    if (Cfg::kE4m3) keep(lane_col16);  // else what follows from it is kept, and other things spilled
    ETAP_ROLLED
    for (int chunk = -1; chunk < Cfg::kRingLatent; ++chunk) {
      smem.control.empty[at.slot].wait(at.parity ^ 1);
      bool const rope = Cfg::kRopeRowBytes == 64 && chunk < 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        // 16 rows further on, the swizzle is the same.
        uint32_t const offset = rope ? rope_offset<Cfg>(first_row, lane_col16) + i * 16 * Cfg::kRopeRowBytes
                                     : swizzled(first_row, lane_col16) + i * 16 * 128;
        uint8_t* const to = smem.ring[at.slot] + offset;
        if (place[i].row >= 0 && !(rope && col16 >= 4)) {
          cute::SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(*reinterpret_cast<uint4 const*>(from[i]),
                                                       *reinterpret_cast<uint4*>(to));
        }
        from[i] += chunk == Cfg::kRingLatent / 2 - 1 ? wrap : Cfg::kRingCols;
      }
      cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t*>(&smem.control.full[at.slot]));
      at.advance();
      if (chunk < 0) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          from[i] = static_cast<Element const*>(p.ckv) + place[i].page * p.ckv_page_stride +
                    place[i].row * p.ckv_row_stride + col16 * kVector + first_col;
        }
      }
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

// Beside TMA, a warp of its own hands out the pieces but the first: what it waits for, under way with all the copies,
// does not delay them.
template <class Cfg>
ETAP_DEVICE void post_pieces(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int lane) {
  ETAP_ROLLED
  for (int index = 1; await_piece(smem, index - 1).request >= 0; ++index) post_piece(p, smem, index, lane);
}

template <class Cfg>
ETAP_DEVICE void produce(MlaDecodeParams const& p, CUtensorMap const& ckv_map, CUtensorMap const& kpe_map,
                         SharedStorage<Cfg>& smem, KeyPlace first, int warp, int lane) {
  bool const gather = p.box_rows == 0;
  if (!gather && warp > 0) {
    if (warp == 2) post_pieces(p, smem, lane);
    if constexpr (Cfg::kGroups) {
      if (warp == 1 && p.group_scale) produce_scales(p, smem, lane);
    }
    return;
  }
  RingPosition<Cfg> at{0, 0};
  ETAP_ROLLED
  for (int index = 0;; ++index) {
    if (warp == 0 && (gather || index == 0)) post_piece(p, smem, index, lane);
    PieceInfo const& piece = await_piece(smem, index);
    if (piece.request < 0) break;
    if (!gather) {
      if (index > 0) first = BoxLane(p, lane).look_up(p, piece.request, piece.pages, piece.len, piece.begin);
      load_piece_tma(p, ckv_map, kpe_map, smem, piece, first, at, lane);
    } else {
      int thread = warp * 32 + lane;
      keep(thread);  // else what follows from it is kept from piece to piece, and other things spilled
      if (p.gather_16b) {
        load_piece_gather(p, smem, piece, at, thread);
      } else {
        load_piece_elements(p, smem, piece, at, thread);
      }
    }
    lend_chunks(smem, at, piece, gather || lane == 0);
    keep(index);  // likewise
    release_piece(smem, index, lane);
  }
}

// Requests without keys: output 0, LSE -inf. One warp of each CTA takes every gridDim-th request.
ETAP_DEVICE void write_empty_requests(MlaDecodeParams const& p, int lane) {
  ETAP_ROLLED
  for (int b = blockIdx.x; b < p.batch; b += gridDim.x) {
    if (cache_len(p, b) > 0) continue;
    int const token0 = query_begin(p, b), rows = query_len(p, b) * p.num_heads, bytes = p.out_fp32 ? 4 : 2;
    ETAP_ROLLED
    for (int row = 0; row < rows; ++row) {
      uint8_t* const out = static_cast<uint8_t*>(p.out) + row_offset(p, p.out_stride, b, token0, row) * bytes;
      ETAP_ROLLED
      for (int i = lane; i < kLatentDim * bytes / 16; i += 32) {
        reinterpret_cast<uint4*>(out)[i] = make_uint4(0, 0, 0, 0);
      }
      if (p.lse && lane == 0) p.lse[row_offset(p, p.lse_stride, b, token0, row)] = -INFINITY;
    }
  }
}

}  // namespace etap
