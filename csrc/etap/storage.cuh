// Shared memory of one CTA, the ring of KV chunks in it, and the lengths that everything follows from.
#pragma once

#include "schedule.h"
#include "sm90.cuh"
#include "trace.cuh"

namespace etap {

constexpr int kPieceBuffers = 4;  // pieces that the producer may be ahead of the consumers, and one

// Position in the ring; parity 0 is the first pass of the consumers.
template <class Cfg>
struct RingPosition {
  uint32_t slot, parity;

  // The position of the n-th chunk since launch.
  static ETAP_DEVICE RingPosition at(uint32_t n) { return {n % Cfg::kRing, (n / Cfg::kRing) & 1}; }
  ETAP_DEVICE void advance(uint32_t n = 1) {  // n < kRing
    slot += n;
    if (slot >= Cfg::kRing) {
      slot -= Cfg::kRing;
      parity ^= 1;
    }
  }
  ETAP_DEVICE RingPosition ahead(uint32_t n) const {
    RingPosition to = *this;
    to.advance(n);
    return to;
  }
};

// Where a tile's scales lie, likewise.
struct ScalePosition {
  uint32_t slot, parity;

  // Of the n-th tile since launch.
  static ETAP_DEVICE ScalePosition at(uint32_t n) { return {n % kScaleTiles, (n / kScaleTiles) & 1}; }
};

// A piece as the CTA's roles share it.
struct PieceInfo : Piece {
  int const* pages; // its row of the page table
  int len;          // keys of the request
  int token0;       // its first query token, where tokens are ragged
  int q_len;        // its query tokens
  int first_chunk;  // chunks of this CTA before it, since launch
  int table;        // which RowTarget table it has: its number among the pending pieces, or 2 or 3 in turn
};

// Where an output row goes, in elements; out < 0: not a row of the request.
struct RowTarget {
  int64_t out, lse;
};

// Scales of a cache's latent columns, tile by tile in turn since launch; nothing where the cache has none.
template <class Cfg, bool = Cfg::kGroups>
struct ScaleStorage {};
template <class Cfg>
struct ScaleStorage<Cfg, true> {
  float4 scales[kScaleTiles][kTileKeys];   // of a key's four groups of columns; 1 without scales in memory
  uint4 power[kConsumerGroups][4];         // of each group of columns, each warp's own copy: see raise_powers
  alignas(8) float rope_scale[Cfg::kRowTile];  // a rope score's factor to log2 units, where the rope part is e4m3
  FullBarrier scales_full[kScaleTiles];    // one arrival per thread that loads scales: 32 beside TMA, else 128
  EmptyBarrier scales_empty[kScaleTiles];  // one arrival per consumer thread
  int first_tile[kPieceBuffers];           // of each of Control::piece: tiles of this CTA before it, since launch
  int next_tile;                           // behind the last piece posted
};

template <class Cfg>
struct Operands {
  // A chunk: 64 keys x 128 bytes, swizzled. Per tile: the rope chunk, then the latent chunks.
  uint8_t ring[Cfg::kRing][kChunkBytes];
  // Q: chunks of [row][64 columns], swizzled; rope last.
  uint8_t query[Cfg::kQueryChunks][Cfg::kRowTile * 128];
  // P^T as [part][row][64 keys], swizzled; two buffers per writer, so that a tile's writers need not wait for the
  // readers of the tile before. Wide: one, for all. With scales for groups of latent columns, a version for each.
  uint8_t prob[Cfg::kProbBuffers][Cfg::kProbVersions * Cfg::kProbBytes];
};

// Wide: and partial scores that a warpgroup gives the one that has their rows' statistics.
template <class Cfg, bool = Cfg::kWide>
struct OperandsAndScores : Operands<Cfg> {};
template <class Cfg>
struct OperandsAndScores<Cfg, true> : Operands<Cfg> {
  float4 given[kConsumerGroups][Cfg::kGivenQuads][128];  // by giver and thread
};

template <class Cfg>
struct alignas(1024) SharedStorage : OperandsAndScores<Cfg> {
  struct Control : ScaleStorage<Cfg> {
    float4 warp_stat[kConsumerGroups][Cfg::kScoreRows];  // of each warp of a warpgroup: tile maximum, or sum
    float reference[kConsumerGroups][Cfg::kScoreRows];   // per warpgroup: reference maximum (log2 units)
    alignas(8) float row_scale[Cfg::kE4m3 ? Cfg::kRowTile : 1];   // e4m3: a score's factor to log2 units
    alignas(8) float out_factor[Cfg::kWide ? Cfg::kRowTile : 1];  // wide: O^T's, of a raised reference or at the end
    float value_scale[Cfg::kE4m3 ? 4 : 1];             // e4m3: ckv_scale, by PieceInfo::table
    RowTarget rows[4][Cfg::kRowTile];  // of the two pending pieces, and of whole pieces in turn
    FullBarrier full[Cfg::kRing];      // TMA: 1 arrival + bytes; gather: 128 arrivals
    EmptyBarrier empty[Cfg::kRing];    // 128 arrivals: the threads that used the chunk last; wide: 256
    EmptyBarrier piece_full[kPieceBuffers];   // 1 arrival; gather: and one per thread of the three other warps
    EmptyBarrier piece_empty[kPieceBuffers];  // one arrival per thread that reads pieces
    PieceInfo piece[kPieceBuffers];    // request < 0: no more
    PieceCursor cursor;                // of the warp that posts the pieces
    int next_chunk, num_pending;       // behind the last piece posted
    uint32_t epoch;                    // of the workspace
    uint64_t cache_hint;               // with which keys are read
    PieceInfo pending[2];              // partial pieces of this CTA, to be merged
    int kept_len[Cfg::kKeptRequests];        // cache_seqlens, where there are too many for a warp's registers
    int dealt, longest;                      // requests that are dealt, or 0, and most tiles of one
    int kept_tiles[Cfg::kDeals ? Cfg::kKeptRequests : 1];  // theirs
    alignas(8) int of_bin[Cfg::kDeals ? kLengthBins : 1];  // how many are in each length_bin
    int kept_query[Cfg::kKeptRequests + 1];  // likewise cu_seqlens_q
  } control;
  static_assert(sizeof(Control) <= Cfg::kControlBytes);
};

// Tiles of this CTA before a piece, since launch.
template <class Cfg>
ETAP_DEVICE int& first_tile(SharedStorage<Cfg>& smem, PieceInfo const& piece) {
  return smem.control.first_tile[&piece - smem.control.piece];
}

// Waits until this pass of the ring can have begun in `count` chunks from `at` on: until the pass before has been used.
// A full barrier's parity tells a pass from the one before, not from the one before that: where the pass before was the
// other warpgroup's and is late (copies complete in any order), waiting for this pass alone would end at once, on old
// keys.
template <class Cfg>
ETAP_DEVICE void await_previous_pass(SharedStorage<Cfg>& smem, RingPosition<Cfg> at, int count, int lane) {
  if (lane < count) {
    RingPosition<Cfg> const own = at.ahead(lane);
    smem.control.empty[own.slot].wait(own.parity ^ 1);
  }
  __syncwarp();
}

// This thread is done with a rope chunk, or with a latent one that its warpgroup owns. Every lane arrives, behind its
// own reads: that takes no longer than one lane's arrival (measured), and no barrier of the warp before it.
template <class Cfg>
ETAP_DEVICE void free_rope(SharedStorage<Cfg>& smem, uint32_t slot) {
  smem.control.empty[slot].arrive();
}
template <class Cfg>
ETAP_DEVICE void free_latent(SharedStorage<Cfg>& smem, uint32_t slot) {
  arrive<Cfg::kOwnerArrivals>(smem.control.empty[slot]);
}

// The number of this CTA where `num_ctas` take part.
ETAP_DEVICE int own_cta(MlaDecodeParams const& p, int num_ctas) {
  cutlass::FastDivmod const& by = p.ctas_divmod;
  // as FastDivmod::divide, which asks whether the divisor is 1: n is 0 then
  auto const by_grid = [&](int n) { return int(__umulhi(n, by.multiplier) >> by.shift_right); };
  return spread_cta(blockIdx.x, num_ctas, by.divisor, by_grid);
}

// ---- lengths
ETAP_DEVICE int query_begin(MlaDecodeParams const& p, int request) {
  return p.cu_seqlens_q ? p.cu_seqlens_q[request] : 0;
}
ETAP_DEVICE int query_len(MlaDecodeParams const& p, int request) {
  return p.cu_seqlens_q ? p.cu_seqlens_q[request + 1] - p.cu_seqlens_q[request] : p.q_len;
}
ETAP_DEVICE int clamped_len(MlaDecodeParams const& p, int cache_seqlen) {
  return min(max(cache_seqlen, 0), p.capacity);
}
ETAP_DEVICE int cache_len(MlaDecodeParams const& p, int request) { return clamped_len(p, p.cache_seqlens[request]); }

// A request's row of the page table. Meaningless where there is none.
ETAP_DEVICE int const* page_row(MlaDecodeParams const& p, int request) {
  return p.page_table + (p.page_indptr ? p.page_indptr[request] : request * p.page_table_stride);
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

// Element offset of row `row` (token x heads + head) of a request.
ETAP_DEVICE int64_t row_offset(MlaDecodeParams const& p, RowStrides const& s, int request, int token0, int row) {
  int const token = p.heads_divmod.divide(row);
  return request * s.batch + (token0 + token) * s.token + (row - token * p.num_heads) * s.head;
}

// What the sum of P V is multiplied by, for the piece with this table.
template <class Cfg>
ETAP_DEVICE float value_scale(SharedStorage<Cfg> const& smem, int table) {
  if constexpr (Cfg::kE4m3) return smem.control.value_scale[table];
  return 1.0f;
}

template <class Cfg>
ETAP_DEVICE RequestWork request_work(MlaDecodeParams const& p, int cache_seqlen, int query_len) {
  return {(clamped_len(p, cache_seqlen) + kTileKeys - 1) / kTileKeys,
          (query_len * p.num_heads + Cfg::kRowTile - 1) / Cfg::kRowTile};
}

}  // namespace etap
