// Merge of partial results inside the launch. Every CTA that holds a part of some rows merges an equal slice of them.
// The workspace words validate themselves: they hold kUnwritten until a result is stored, a reader polls until it is
// there, and puts kUnwritten back. All CTAs are resident (the launch is cooperative), so the wait ends.
#pragma once

#include "epilogue.cuh"

namespace etap {

// Polls with a pause, so that early CTAs do not disturb the memory traffic of late ones.
ETAP_DEVICE float2 wait_stats(float2 const* from) {
  float2 v = load_relaxed(from);
  while (!written(v)) {
    __nanosleep(64);
    v = load_relaxed(from);
  }
  return v;
}

template <class Cfg>
struct MergeScratch {  // lies over the ring, which is idle by then
  float4 group_sum[kConsumerThreads];
  float2 stats[1];  // [part][row]: maximum and sum; then weight in x
};

// Weights of the parts, normalised. One row belongs to kConsumerThreads / kRowTile consecutive lanes.
template <class Cfg>
ETAP_DEVICE void merge_weights(MlaDecodeParams const& p, Piece const& piece, RowTarget const* rows, float2* stats,
                               int thread) {
  constexpr int kLanes = kConsumerThreads / Cfg::kRowTile;
  static_assert(kLanes <= 32);
  int const r = thread / kLanes, first = thread % kLanes;
  float top = kNoReference;
ETAP_ROLLED
  for (int i = first; i < piece.num_parts; i += kLanes) {
    float2 const v = wait_stats(stats_slot<Cfg>(p, piece.slot(i)) + r);
    top = fmaxf(top, v.x);
    stats[i * Cfg::kRowTile + r] = v;
  }
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
  float sum = 0.0f;
ETAP_ROLLED
  for (int i = first; i < piece.num_parts; i += kLanes) {
    float2& v = stats[i * Cfg::kRowTile + r];
    v.x = exp2_approx(v.x - top);
    sum = fmaf(v.x, v.y, sum);
  }
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  float const scale = sum > 0.0f ? 1.0f / sum : 0.0f;
ETAP_ROLLED
  for (int i = first; i < piece.num_parts; i += kLanes) stats[i * Cfg::kRowTile + r].x *= scale;
  if (piece.part == 0 && first == 0) write_lse(p, rows[r], top, sum);
}

// The last of a piece's CTAs to have read the statistics erases them.
template <class Cfg>
ETAP_DEVICE void retire_statistics(MlaDecodeParams const& p, Piece const& piece, int lane) {
  int* const count = p.merge_count + piece.first_slot;
  int arrived = 0;
  if (lane == 0) arrived = atomicAdd(count, 1) + 1;
  if (__shfl_sync(~0u, arrived, 0) < piece.num_parts) return;
  float const unwritten = __uint_as_float(kUnwritten);
ETAP_ROLLED
  for (int i = lane; i < piece.num_parts * Cfg::kRowTile; i += 32) {
    stats_slot<Cfg>(p, piece.slot(i / Cfg::kRowTile))[i % Cfg::kRowTile] = make_float2(unwritten, unwritten);
  }
  if (lane == 0) *count = 0;
}

// Writes one quad (see partial_slot) of the output.
template <class T, class Cfg>
ETAP_DEVICE void store_quad(MlaDecodeParams const& p, RowTarget const* rows, int quad, float4 v) {
  constexpr int kQuads = Cfg::kRowTile / 8;
  int const lane = quad % 32, chunk = quad / (128 * kQuads);
  int const column = chunk * kChunkCols + quad % 128 / 32 * 16 + lane / 4;
  int const row = 8 * (quad / 128 % kQuads) + 2 * (lane & 3);
  float const values[2][2] = {{v.x, v.z}, {v.y, v.w}};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    int64_t const target = rows[row + e].out;
    if (target < 0) continue;
    if (p.out_fp32) {
      float* const out = static_cast<float*>(p.out) + target + column;
      out[0] = values[e][0];
      out[8] = values[e][1];
    } else {
      T* const out = static_cast<T*>(p.out) + target + column;
      out[0] = T(values[e][0]);
      out[8] = T(values[e][1]);
    }
  }
}

// Weighted sum of one quad over parts first, first + step, ...; erases what it read.
template <class Cfg>
ETAP_DEVICE float4 sum_parts(MlaDecodeParams const& p, Piece const& piece, float2 const* stats, int quad, int first,
                             int step) {
  constexpr int kBatch = 8;  // loads in flight
  int const row = 8 * (quad / 128 % (Cfg::kRowTile / 8)) + 2 * (quad & 3);
  float const unwritten = __uint_as_float(kUnwritten);
  float4 acc = make_float4(0, 0, 0, 0);
ETAP_ROLLED
  for (int base = first; base < piece.num_parts; base += kBatch * step) {
    float4 v[kBatch];
    float4* from[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      from[k] = partial_slot<Cfg>(p, piece.slot(base + k * step)) + quad;
      if (base + k * step < piece.num_parts) v[k] = load_relaxed(from[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      int const i = base + k * step;
      if (i >= piece.num_parts) break;
      while (!written(v[k])) v[k] = load_relaxed(from[k]);
      *from[k] = make_float4(unwritten, unwritten, unwritten, unwritten);
      float4 const w = *reinterpret_cast<float4 const*>(stats + i * Cfg::kRowTile + row);  // x, z: of two rows
      acc.x = fmaf(v[k].x, w.x, acc.x);
      acc.y = fmaf(v[k].y, w.z, acc.y);
      acc.z = fmaf(v[k].z, w.x, acc.z);
      acc.w = fmaf(v[k].w, w.z, acc.w);
    }
  }
  return acc;
}

template <class T, class Cfg>
ETAP_DEVICE void merge_slice(MlaDecodeParams const& p, Piece const& piece, RowTarget const* rows,
                             MergeScratch<Cfg>& scratch, int thread) {
  constexpr int kAllQuads = Cfg::kRowTile * kLatentDim / 4;
  EvenCut const cut(kAllQuads, piece.num_parts);
  int const begin = cut.begin(piece.part), end = cut.begin(piece.part + 1);
  // Threads side by side on the slice; the others share its parts.
  int const width = min(kConsumerThreads, max(8, 1 << (32 - __clz(cut.base))));
  int const groups = kConsumerThreads / width, group = thread / width;
ETAP_ROLLED
  for (int base = begin; base < end; base += width) {
    int const quad = base + thread % width;
    float4 acc = make_float4(0, 0, 0, 0);
    if (quad < end) acc = sum_parts<Cfg>(p, piece, scratch.stats, quad, group, groups);
    if (groups > 1) {
      scratch.group_sum[thread] = acc;
      sync_consumers();
      if (group == 0) {
ETAP_ROLLED
        for (int g = 1; g < groups; ++g) {
          float4 const v = scratch.group_sum[g * width + thread];
          acc.x += v.x, acc.y += v.y, acc.z += v.z, acc.w += v.w;
        }
      }
      sync_consumers();
    }
    if (quad < end && group == 0) store_quad<T, Cfg>(p, rows, quad, acc);
  }
}

template <class T, class Cfg>
ETAP_DEVICE void merge_pending(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int num_pending, int thread) {
  auto& scratch = *reinterpret_cast<MergeScratch<Cfg>*>(smem.ring);
  sync_consumers();  // the ring is idle
ETAP_ROLLED
  for (int i = 0; i < num_pending; ++i) {
    Piece const piece = smem.control.pending[i];
    merge_weights<Cfg>(p, piece, smem.control.rows[i], scratch.stats, thread);
    sync_consumers();
    if (thread < 32) retire_statistics<Cfg>(p, piece, thread);
    merge_slice<T>(p, piece, smem.control.rows[i], scratch, thread);
    sync_consumers();
  }
}

}  // namespace etap
