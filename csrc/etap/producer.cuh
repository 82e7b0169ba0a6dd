// The producer warpgroup: hands out the pieces and fills the ring, chunk by chunk, through TMA or cp.async gathers.
#pragma once

#include "cache_maps.h"
#include "producer_gather.cuh"

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

// A tile of `rows` keys in boxes less than a tile: a lane's box, if it `loads` one, lies at `place`, and goes to the
// tile's rows from `row` on. One lane `leads`.
template <class Cfg>
ETAP_DEVICE void load_boxes(CUtensorMap const& ckv, CUtensorMap const& kpe, uint64_t hint, SharedStorage<Cfg>& smem,
                            KeyPlace place, int row, bool loads, bool leads, int rows, int odd,
                            RingPosition<Cfg>& at) {
  ETAP_ROLLED
  for (int chunk = -1; chunk < Cfg::kRingLatent; ++chunk) {
    bool const rope = chunk < 0;
    int const row_bytes = rope ? Cfg::kRopeRowBytes : 128;
    auto& full = smem.control.full[at.slot];
    smem.control.empty[at.slot].wait(at.parity ^ 1);
    if (leads) full.arrive_and_expect_tx(rows * row_bytes);
    __syncwarp();
    if (loads) {
      cute::SM90_TMA_LOAD_3D::copy(rope ? &kpe : &ckv, reinterpret_cast<uint64_t*>(&full), hint,
                                   smem.ring[at.slot] + row * row_bytes, rope ? 0 : Cfg::latent_column(chunk, odd),
                                   place.row, place.page);
    }
    at.advance();
  }
}

// What a chunk costs here, from the wait to the copy, delays every refill of the ring: a longer loop was 18% slower at
// 64K keys on the emulated H20. `next`: of the first round.
template <class Cfg>
ETAP_DEVICE void load_piece_tma(MlaDecodeParams const& p, CacheMaps const& maps, SharedStorage<Cfg>& smem,
                                PieceInfo const& piece, KeyPlace next, RingPosition<Cfg>& at, int lane) {
  BoxLane const own(p, lane);
  int const boxes = 1 << own.log_boxes, tiles_per_round = 32 >> own.log_boxes;
  int const begin = piece.begin, end = piece.end, len = piece.len, request = piece.request;
  int const* const pages = piece.pages;
  uint64_t const hint = smem.control.cache_hint;
  int const end_keys = len - (end - 1) * kTileKeys;  // in the last tile, if it is the request's
  int const full_end = end - (boxes == 1 && end_keys <= kTileKeys - kEndRows);
  ETAP_ROLLED
  for (int first = begin; first < end; first += tiles_per_round) {
    KeyPlace const box = next;
    trace(kLookedUp, first == begin && at.slot + at.parity == 0 && lane == 0);
    int const count = min(tiles_per_round, full_end - first);
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
            cute::SM90_TMA_LOAD_3D::copy(chunk < 0 ? &maps.kpe : &maps.ckv,
                                         reinterpret_cast<uint64_t*>(&smem.control.full[to.slot]), hint,
                                         smem.ring[to.slot], chunk < 0 ? 0 : Cfg::latent_column(chunk, 0) ^ flip, row,
                                         page);
            to.advance();
          }
        }
        __syncwarp();
        at.advance(Cfg::kRingTile);
        continue;
      }
      load_boxes(maps.ckv, maps.kpe, hint, smem, box, own.row, own.tile == tile, lane == tile * boxes, kTileKeys,
                 (first + tile - begin) & 1, at);
    }
    if (full_end < end && end - first <= tiles_per_round) {  // the tile in which the length ends
      int const tile = full_end - first, row = lane * kEndRows;
      KeyPlace const place{__shfl_sync(~0u, box.page, tile), __shfl_sync(~0u, box.row, tile) + row};
      int const count = (end_keys + kEndRows - 1) / kEndRows;
      load_boxes(maps.ckv_end, maps.kpe_end, hint, smem, place, row, lane < count, lane == 0, count * kEndRows,
                 (full_end - begin) & 1, at);
    }
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
ETAP_DEVICE void produce(MlaDecodeParams const& p, CacheMaps const& maps, SharedStorage<Cfg>& smem, KeyPlace first,
                         int warp, int lane) {
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
    if (warp == 0 && (gather || index == 0)) {
      post_piece(p, smem, index, lane);
    } else if (gather) {  // so that what it stored to the ring is before what is done behind the last piece
      smem.control.piece_full[index % kPieceBuffers].arrive();
    }
    PieceInfo const& piece = await_piece(smem, index);
    if (piece.request < 0) break;
    if (!gather) {
      if (index > 0) first = BoxLane(p, lane).look_up(p, piece.request, piece.pages, piece.len, piece.begin);
      load_piece_tma(p, maps, smem, piece, first, at, lane);
    } else {
      int thread = warp * 32 + lane;
      keep(thread);  // else what follows from it is kept from piece to piece, and other things spilled
      if (p.gather_16b && smem.control.cache_hint == kEvictFirst) {
        load_piece_gather<true>(p, smem, piece, at, thread);
      } else if (p.gather_16b) {
        load_piece_gather<false>(p, smem, piece, at, thread);
      } else {
        load_piece_elements(p, smem, piece, at, thread);
      }
    }
    lend_chunks(smem, at, piece, gather || lane == 0);
    keep(index);  // likewise
    release_piece(smem, index);
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
