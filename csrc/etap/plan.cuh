// The plan of a launch, computed by one warp of every CTA from the lengths alone, and the pieces handed to the CTA's
// other roles.
#pragma once

#include "storage.cuh"

namespace etap {

ETAP_DEVICE int warp_sum(int v) { return __reduce_add_sync(~0u, v); }

// Finds the request in which the running sum of weight(request) passes `target`, narrowing by 32 a round.
template <class F>
ETAP_DEVICE void locate(int batch, int lane, int target, F&& weight, int& request, int& prefix) {
  int lo = 0, hi = batch;
  prefix = 0;
  while (true) {
    int const per_lane = (hi - lo + 31) / 32;
    int const begin = lo + lane * per_lane, end = min(begin + per_lane, hi);
    int own = 0;
ETAP_ROLLED
    for (int b = begin; b < end; ++b) own += weight(b);
    int inclusive = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      int const below = __shfl_up_sync(~0u, inclusive, d);
      if (lane >= d) inclusive += below;
    }
    uint32_t const passed = __ballot_sync(~0u, prefix + inclusive > target);
    int const hit = __ffs(passed) - 1;  // the plan's total exceeds every CTA's target, so there is one
    prefix += __shfl_sync(~0u, inclusive - own, hit);
    lo += hit * per_lane;
    hi = min(lo + per_lane, hi);
    if (per_lane == 1) break;
  }
  request = lo;
}

// Sets the cursor at this CTA's first piece.
template <class Cfg>
ETAP_DEVICE void plan_launch(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int lane) {
  // Up to 32 requests, each lane keeps the one request it ever asks for.
  RequestWork const own = lane < p.batch ? request_work<Cfg>(p, lane) : RequestWork{0, 0};
  auto work_of = [&](int b) { return b < 32 ? own : request_work<Cfg>(p, b); };
  int tiles = 0, longest = 0, virtual_requests = 0;
ETAP_ROLLED
  for (int b = lane; b < p.batch; b += 32) {
    RequestWork const w = work_of(b);
    tiles += w.tiles * w.row_tiles;
    longest = max(longest, w.row_tiles ? w.tiles : 0);
    virtual_requests += w.tiles ? w.row_tiles : 0;
  }
  tiles = warp_sum(tiles);
  longest = __reduce_max_sync(~0u, longest);
  virtual_requests = warp_sum(virtual_requests);
  Plan const plan = make_plan(tiles, longest, virtual_requests, gridDim.x, [&](int share) {
    int sum = 0;
ETAP_ROLLED
    for (int b = lane; b < p.batch; b += 32) {
      RequestWork const w = work_of(b);
      sum += quotient_up(w.tiles, share) * w.row_tiles;
    }
    return warp_sum(sum);
  });
  int request = 0, prefix = 0;
  if (int(blockIdx.x) < plan.num_ctas) {
    bool const small = p.batch <= 32;
    locate(p.batch, lane, plan_target(plan, blockIdx.x),
           [&](int b) { return plan_weight(plan, small ? own : request_work<Cfg>(p, b)); }, request, prefix);
  }
  if (lane == 0) smem.control.cursor = PieceCursor(plan, blockIdx.x, request, prefix);
  __syncwarp();
}

// Hands the next piece, or the end, to the CTA's warps. One warp calls this.
template <class Cfg>
ETAP_DEVICE void post_piece(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int index, int lane) {
  int const buffer = index % kPieceBuffers;
  smem.control.piece_empty[buffer].wait((index / kPieceBuffers & 1) ^ 1);
  PieceCursor cursor = smem.control.cursor;
  PieceInfo piece;
  piece.request = -1;
  if (!cursor.done()) {
    static_cast<Piece&>(piece) = cursor.next([&](int b) { return request_work<Cfg>(p, b); });
    piece.len = cache_len(p, piece.request);
    piece.token0 = query_begin(p, piece.request);
    piece.q_len = query_len(p, piece.request);
  }
  __syncwarp();
  if (lane == 0) {
    smem.control.cursor = cursor;
    smem.control.piece[buffer] = piece;
    smem.control.piece_full[buffer].arrive();
  }
  __syncwarp();
}

// The index-th piece of this CTA; every reader calls release_piece when it is done with it.
template <class Cfg>
ETAP_DEVICE PieceInfo const& await_piece(SharedStorage<Cfg>& smem, int index) {
  smem.control.piece_full[index % kPieceBuffers].wait(index / kPieceBuffers & 1);
  return smem.control.piece[index % kPieceBuffers];
}
template <class Cfg>
ETAP_DEVICE void release_piece(SharedStorage<Cfg>& smem, int index, int lane) {
  __syncwarp();
  if (lane == 0) smem.control.piece_empty[index % kPieceBuffers].arrive();
}

}  // namespace etap
