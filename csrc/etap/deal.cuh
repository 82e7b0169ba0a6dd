// Requests by rank: the plan deals them, the longest first, without sorting them (schedule.h).
#pragma once

#include "workspace.cuh"

namespace etap {

ETAP_DEVICE int warp_sum(int v) { return __reduce_add_sync(~0u, v); }

ETAP_DEVICE int inclusive_sum(int v, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    int const below = __shfl_up_sync(~0u, v, d);
    if (lane >= d) v += below;
  }
  return v;
}

// A lane's share of the requests, where a warp goes through them: neighbours.
struct LaneRequests {
  int each, first, last;

  ETAP_DEVICE LaneRequests(MlaDecodeParams const& p, int lane)
      : each((p.batch + 31) / 32), first(lane * each), last(min(first + each, p.batch)) {}
};

// Finds requests by rank: by length_bin, the longest first, then by number. One warp calls these, once Control has
// kept_tiles and longest.
template <class Cfg>
struct RankedRequests {
  typename SharedStorage<Cfg>::Control& control;
  int lane;
  LaneRequests own;

  ETAP_DEVICE RankedRequests(MlaDecodeParams const& p, typename SharedStorage<Cfg>::Control& control_, int lane_)
      : control(control_), lane(lane_), own(p, lane_) {}

  // The bin of a request, < 0 if it has no tiles.
  ETAP_DEVICE int bin_of(int request) const {
    int const tiles = control.kept_tiles[request];
    return tiles ? length_bin(tiles, control.longest) : -1;
  }
  // Counts the requests of each bin, which all that follows needs.
  ETAP_DEVICE void count() const {
    static_assert(kLengthBins == 2 * 32);
    reinterpret_cast<int2*>(control.of_bin)[lane] = {0, 0};
    __syncwarp();
    ETAP_ROLLED
    for (int b = own.first; b < own.last; ++b) {
      if (int const bin = bin_of(b); bin >= 0) atomicAdd(&control.of_bin[bin], 1);
    }
    __syncwarp();
  }
  ETAP_DEVICE int find(int rank) const {
    int from_top = lane;
    keep(from_top);  // else the address is worked out when the kernel starts, and spilled
    int2 const of_lane = reinterpret_cast<int2 const*>(control.of_bin)[31 - from_top];  // lane 0 has the longest
    int const end = inclusive_sum(of_lane.x + of_lane.y, lane);
    int const bin_lane = __ffs(__ballot_sync(~0u, end > rank)) - 1;
    int const before = __shfl_sync(~0u, end - of_lane.x - of_lane.y, bin_lane);
    int const upper = __shfl_sync(~0u, of_lane.y, bin_lane);  // requests of the longer of the lane's bins
    bool const lower = rank >= before + upper;
    int const bin = kLengthBins - 1 - 2 * bin_lane - lower;
    int mine = 0;
    ETAP_ROLLED
    for (int b = own.first; b < own.last; ++b) mine += bin_of(b) == bin;
    int to_go = rank - before - (lower ? upper : 0) - (inclusive_sum(mine, lane) - mine), at = 0;
    int const owner = __ffs(__ballot_sync(~0u, to_go >= 0 && to_go < mine)) - 1;
    ETAP_ROLLED
    for (int b = own.first; b < own.last; ++b) {
      if (bin_of(b) == bin && to_go-- == 0) at = b;
    }
    return __shfl_sync(~0u, at, owner);
  }
};

}  // namespace etap
