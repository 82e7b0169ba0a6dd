// The plan of a launch, computed by one warp of every CTA from the lengths alone, and the pieces handed to the CTA's
// other roles.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "deal.cuh"

namespace etap {

// Finds the request of lo to hi - 1 in which the running sum of weight(request) passes `target`, narrowing by 32 a
// round. `prefix`: the sum before lo, then before the request, which is returned.
template <class F>
ETAP_DEVICE int locate(int lo, int hi, int lane, int target, F&& weight, int& prefix) {
  while (hi - lo > 1) {
    int const per_lane = (hi - lo + 31) / 32;
    int const begin = lo + lane * per_lane, end = min(begin + per_lane, hi);
    int own = 0;
    ETAP_ROLLED
    for (int b = begin; b < end; ++b) own += weight(b);
    int const inclusive = inclusive_sum(own, lane);
    uint32_t const passed = __ballot_sync(~0u, prefix + inclusive > target);
    int const hit = __ffs(passed) - 1;  // the plan's total exceeds every CTA's target, so there is one
    prefix += __shfl_sync(~0u, inclusive - own, hit);
    lo += hit * per_lane;
    hi = min(lo + per_lane, hi);
  }
  return lo;
}

// A partial piece of one tile concerns one warpgroup alone: nothing is exchanged, no ring chunk lent for it.
ETAP_DEVICE bool exchanges(Piece const& piece) { return piece.whole() || piece.end - piece.begin > 1; }
template <class Cfg>
ETAP_DEVICE int lent_chunks(Piece const& piece) {
  return exchanges(piece) ? Cfg::kExchangeChunks : 0;
}

template <class Cfg>
using Control = typename SharedStorage<Cfg>::Control;

// Leaves a piece where the CTA's warps find it; `len`: keys of its request. One thread calls this.
template <class Cfg>
ETAP_DEVICE void write_piece(MlaDecodeParams const& p, Control<Cfg>& control, int index, Piece const& piece,
                             int len) {
  PieceInfo& to = control.piece[index % kPieceBuffers];
  static_cast<Piece&>(to) = piece;
  to.pages = page_row(p, piece.request);
  to.len = len;
  to.token0 = query_begin(p, piece.request);
  to.q_len = query_len(p, piece.request);
  to.first_chunk = index == 0 ? 0 : control.next_chunk;
  int const pending = index == 0 ? 0 : control.num_pending;
  to.table = piece.whole() ? 2 + index % 2 : pending;
  control.num_pending = pending + !piece.whole();
  if constexpr (Cfg::kGroups) {
    int const tile = index == 0 ? 0 : control.next_tile;
    control.first_tile[index % kPieceBuffers] = tile;
    control.next_tile = tile + piece.end - piece.begin;
  }
  control.next_chunk = to.first_chunk + (piece.end - piece.begin) * Cfg::kRingTile + lent_chunks<Cfg>(piece);
}

template <class Cfg>
ETAP_DEVICE void write_end(Control<Cfg>& control, int index) {
  control.piece[index % kPieceBuffers].request = -1;
  if (index == 0) control.num_pending = 0;
}

// Where the plan reads lengths that no lane keeps: again and again, so from shared memory unless there are very many.
template <class Cfg>
struct Lengths {
  MlaDecodeParams const& p;
  int const *cache, *query;  // as cache_seqlens and cu_seqlens_q

  ETAP_DEVICE Lengths(MlaDecodeParams const& p_, Control<Cfg>& control)
      : p(p_), cache(p.cache_seqlens), query(p.cu_seqlens_q) {
    if (!kept(p)) return;
    cache = control.kept_len;
    if (query) query = control.kept_query;
  }
  static ETAP_DEVICE bool kept(MlaDecodeParams const& p) {
    return p.batch > kMostOwned && p.batch <= Cfg::kKeptRequests;
  }
  // Brings them there. One warp calls this.
  static ETAP_DEVICE void bring(MlaDecodeParams const& p, Control<Cfg>& control, int lane) {
    using Copy = cute::SM80_CP_ASYNC_CACHEALWAYS<int>;
    ETAP_ROLLED
    for (int b = lane; b < p.batch; b += 32) {
      Copy::copy(p.cache_seqlens[b], control.kept_len[b]);
      if (p.cu_seqlens_q) Copy::copy(p.cu_seqlens_q[b], control.kept_query[b]);
    }
    if (p.cu_seqlens_q && lane == 0) control.kept_query[p.batch] = p.cu_seqlens_q[p.batch];
    cute::cp_async_fence();
    cute::cp_async_wait<0>();
    __syncwarp();
  }
  ETAP_DEVICE RequestWork operator()(int b) const {
    return request_work<Cfg>(p, cache[b], query ? query[b + 1] - query[b] : p.q_len);
  }
};

// Where requests are dealt: the index-th of this CTA, or the end. One warp calls this.
template <class Cfg>
ETAP_DEVICE void next_dealt(MlaDecodeParams const& p, Control<Cfg>& control, int index, int lane) {
  int const rank = dealt_rank(gridDim.x, blockIdx.x, index);
  if (rank < control.dealt) {
    int const request = RankedRequests<Cfg>(p, control, lane).find(rank);
    Piece const piece = whole_piece(request, control.kept_tiles[request], blockIdx.x);
    if (lane == 0) write_piece<Cfg>(p, control, index, piece, clamped_len(p, control.kept_len[request]));
  } else if (lane == 0) {
    write_end<Cfg>(control, index);
  }
  __syncwarp();
}

// Works out the next piece, or the end. One warp calls this.
template <class Cfg>
ETAP_DEVICE void next_piece(MlaDecodeParams const& p, Control<Cfg>& control, PieceCursor& cursor, int index,
                            int lane) {
  if (lane == 0) {
    Piece piece;
    Lengths<Cfg> const lengths(p, control);
    if (cursor.next(lengths, piece)) {
      write_piece<Cfg>(p, control, index, piece, clamped_len(p, lengths.cache[piece.request]));
    } else {
      write_end<Cfg>(control, index);
    }
    control.cursor = cursor;
  }
  __syncwarp();
}

// Makes the plan and this CTA's first piece, if it has one. found(piece, keys of its request) is called by all lanes,
// before the piece is written for the CTA's other warps. Returns what the plan follows from.
template <class Cfg, class Found>
ETAP_DEVICE WorkTotals plan_launch(MlaDecodeParams const& p, Control<Cfg>& control, int lane, Found&& found) {
  bool const owned = p.batch <= kMostOwned;
  LaneRequests const requests(p, lane);
  int const each = requests.each, first = requests.first, last = requests.last;
  bool const several = owned && each > 1;  // else what is about a lane's second request and the next is passed over
  Lengths<Cfg> const lengths(p, control);
  WorkTotals totals;
  bool ranks = false;  // see make_plan
  int own_len[kOwnRequests];
  RequestWork own[kOwnRequests];
  if (owned) {
    int own_query[kOwnRequests];
    auto const ask = [&](int i) {
      own_len[i] = own_query[i] = 0;
      if (first + i >= last) return;
      own_len[i] = cache_len(p, first + i);
      own_query[i] = query_len(p, first + i);
    };
    auto const take = [&](int i) {
      own[i] = request_work<Cfg>(p, own_len[i], own_query[i]);
      totals.add(own[i]);
    };
    ask(0);
    if (several) {
#pragma unroll
      for (int i = 1; i < kOwnRequests; ++i) ask(i);
    }
    take(0);
    if (several) {
#pragma unroll
      for (int i = 1; i < kOwnRequests; ++i) take(i);
    }
  } else {
    if (lengths.kept(p)) lengths.bring(p, control, lane);
    bool const keeps = Cfg::kDeals && lengths.kept(p);
    bool single = true;  // row tile each
    ETAP_ROLLED
    for (int b = first; b < last; ++b) {
      RequestWork const w = lengths(b);
      totals.add(w);
      single = single && w.row_tiles <= 1;
      if (keeps) control.kept_tiles[b] = w.tiles * w.row_tiles;
    }
    ranks = keeps && __all_sync(~0u, single);
  }
  int const own_tiles = totals.tiles;
  totals.tiles = warp_sum(totals.tiles);
  totals.longest = __reduce_max_sync(~0u, totals.longest);
  totals.virtual_requests = warp_sum(totals.virtual_requests);
  int own_ctas[kOwnRequests], own_sum = 0;  // aligned
  Plan const plan = make_plan(totals, gridDim.x, Cfg::kRowTile, Cfg::kUneven, ranks, [&](int share) {
    own_sum = 0;
    if (owned) {
      own_sum = own_ctas[0] = aligned_ctas(own[0], share);
      if (several) {
#pragma unroll
        for (int i = 1; i < kOwnRequests; ++i) own_sum += own_ctas[i] = aligned_ctas(own[i], share);
      }
    } else {
      ETAP_ROLLED
      for (int b = first; b < last; ++b) own_sum += aligned_ctas(lengths(b), share);
    }
    return warp_sum(own_sum);
  });
  int const cta = own_cta(p, plan.num_ctas);
  if (Cfg::kDeals && lane == 0) control.dealt = 0;
  if (plan.share && owned) {  // the common short case: the request's own lane has all it takes
    int const end = inclusive_sum(own_sum, lane);
    int prefix = end - own_sum;
    if (lane == 0) control.cursor.next_tile = control.cursor.end_tile = 0;  // no second piece
    int const owner = __ffs(__ballot_sync(~0u, cta >= prefix && cta < end)) - 1;
    if (owner < 0) {
      if (lane == 0) write_end<Cfg>(control, 0);
      return totals;
    }
    int request = first, len = own_len[0], ctas = own_ctas[0];
    RequestWork work = own[0];
    if (several) {
#pragma unroll
      for (int i = 1; i < kOwnRequests; ++i) {
        if (i >= each || cta < prefix + ctas) continue;
        prefix += ctas;
        request = first + i, len = own_len[i], ctas = own_ctas[i], work = own[i];
      }
    }
    auto const share_out = [&](int& v) { v = __shfl_sync(~0u, v, owner); };
    share_out(request), share_out(len), share_out(prefix), share_out(ctas), share_out(work.tiles);
    share_out(work.row_tiles);
    Piece const piece = aligned_piece(work, request, prefix, ctas, cta);
    found(piece, len);
    if (lane == 0) write_piece<Cfg>(p, control, 0, piece, len);
    return totals;
  }
  if (Cfg::kDeals && plan.dealt) {
    if (lane == 0) control.dealt = totals.virtual_requests, control.longest = totals.longest;
    __syncwarp();
    RankedRequests<Cfg>(p, control, lane).count();
    next_dealt<Cfg>(p, control, 0, lane);
    found(control.piece[0], control.piece[0].len);
    return totals;
  }
  int request = 0, prefix = 0;
  if (cta < plan.num_ctas) {
    int const target = plan_target(plan, cta), own_weight = plan.share ? own_sum : own_tiles;
    int const end = inclusive_sum(own_weight, lane);
    int const owner = __ffs(__ballot_sync(~0u, end > target)) - 1;  // the plan's total exceeds every target
    prefix = __shfl_sync(~0u, end - own_weight, owner);
    auto const weight = [&](int b) { return plan_weight(plan, lengths(b)); };
    request = locate(owner * each, min(owner * each + each, p.batch), lane, target, weight, prefix);
  }
  PieceCursor cursor(plan, cta, request, prefix);
  next_piece<Cfg>(p, control, cursor, 0, lane);
  if (control.piece[0].request >= 0) found(control.piece[0], control.piece[0].len);
  return totals;
}

// With which hint the launch's keys are read. Several row tiles of a request read its keys as often.
template <class Cfg>
ETAP_DEVICE uint64_t cache_hint(MlaDecodeParams const& p, WorkTotals const& totals) {
  bool const little = totals.tiles <= kEvictFirstBytes / Cfg::kTileBytes && totals.virtual_requests <= p.batch;
  return little ? kEvictFirst : kEvictNormal;
}

// Hands the pieces to the CTA's warps, in order. The first was worked out with the plan.
template <class Cfg>
ETAP_DEVICE void post_piece(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int index, int lane) {
  if (index > 0) {
    smem.control.piece_empty[index % kPieceBuffers].wait((index / kPieceBuffers & 1) ^ 1);
    if (Cfg::kDeals && smem.control.dealt) {
      next_dealt<Cfg>(p, smem.control, index, lane);
    } else {
      PieceCursor cursor = smem.control.cursor;
      next_piece<Cfg>(p, smem.control, cursor, index, lane);
    }
  }
  __syncwarp();
  if (lane == 0) smem.control.piece_full[index % kPieceBuffers].arrive();
}

// The index-th piece of this CTA, for the warp that posted it.
template <class Cfg>
ETAP_DEVICE PieceInfo const& posted_piece(SharedStorage<Cfg> const& smem, int index) {
  return smem.control.piece[index % kPieceBuffers];
}
// Likewise, for the others; every thread that reads it calls release_piece when it is done with it.
template <class Cfg>
ETAP_DEVICE PieceInfo const& await_piece(SharedStorage<Cfg> const& smem, int index) {
  smem.control.piece_full[index % kPieceBuffers].wait(index / kPieceBuffers & 1);
  return posted_piece(smem, index);
}
template <class Cfg>
ETAP_DEVICE void release_piece(SharedStorage<Cfg>& smem, int index) {
  smem.control.piece_empty[index % kPieceBuffers].arrive();
}

}  // namespace etap
