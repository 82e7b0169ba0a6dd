// Merge of partial results inside the launch: every CTA that holds a part of some rows merges an equal slice of them.
// The workspace words validate themselves: they hold kUnwritten until a result is stored, a reader polls until it is
// there, and puts kUnwritten back. (A fence and a flag instead measured slower.) All CTAs are resident
// (the launch is cooperative), so the wait ends.
#pragma once

#include "epilogue.cuh"

namespace etap {

template <class Cfg>
struct MergeScratch {  // lies over the ring, which is idle by then
  float4 group_sum[kConsumerThreads];
  float2 stats[1];     // [part][row]: maximum and sum; then weight in x
};

// Brings the statistics of all parts to shared memory, one part's rows per half warp or so, as they become available.
template <class Cfg>
ETAP_DEVICE void read_statistics(MlaDecodeParams const& p, PieceInfo const& piece, float2* stats, int thread) {
  constexpr int kStep = kConsumerThreads / Cfg::kRowTile, kBatch = 4;  // loads in flight
  int const r = thread % Cfg::kRowTile, last = piece.num_parts - 1;
  ETAP_ROLLED
  for (int base = thread / Cfg::kRowTile; base <= last; base += kBatch * kStep) {
    float2 v[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      v[k] = load_relaxed(partial_stats<Cfg>(p, piece.slot(min(base + k * kStep, last))) + r);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      int const i = min(base + k * kStep, last);
      for (int tries = 0; !written(v[k]); ++tries) {
        if (tries > 4) __nanosleep(200);
        v[k] = load_relaxed(partial_stats<Cfg>(p, piece.slot(i)) + r);
      }
      stats[i * Cfg::kRowTile + r] = v[k];
    }
  }
}

// Weights of the parts, normalised. One row belongs to kConsumerThreads / kRowTile consecutive lanes.
template <class Cfg>
ETAP_DEVICE void merge_weights(MlaDecodeParams const& p, PieceInfo const& piece, RowTarget const* rows, float2* stats,
                               int thread) {
  constexpr int kLanes = kConsumerThreads / Cfg::kRowTile;
  static_assert(kLanes <= 32);
  int const r = thread / kLanes, first = thread % kLanes;
  float top = kNoReference, sum = 0.0f;
  ETAP_ROLLED
  for (int i = first; i < piece.num_parts; i += kLanes) top = fmaxf(top, stats[i * Cfg::kRowTile + r].x);
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
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
ETAP_DEVICE void retire_statistics(MlaDecodeParams const& p, PieceInfo const& piece, int lane) {
  int* const count = p.merge_count + piece.first_slot;
  int arrived = 0;
  if (lane == 0) arrived = atomicAdd(count, 1) + 1;
  if (__shfl_sync(~0u, arrived, 0) < piece.num_parts) return;
  float const unwritten = __uint_as_float(kUnwritten);
  ETAP_ROLLED
  for (int i = lane; i < piece.num_parts * Cfg::kRowTile; i += 32) {
    partial_stats<Cfg>(p, piece.slot(i / Cfg::kRowTile))[i % Cfg::kRowTile] = make_float2(unwritten, unwritten);
  }
  if (lane == 0) *count = 0;
}

// Writes one quad (see partial_quads) of the output.
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
ETAP_DEVICE float4 sum_parts(MlaDecodeParams const& p, PieceInfo const& piece, float2 const* stats, int quad, int first,
                             int step) {
  constexpr int kBatch = 8;  // loads in flight
  int const row = 8 * (quad / 128 % (Cfg::kRowTile / 8)) + 2 * (quad & 3), last = piece.num_parts - 1;
  float const unwritten = __uint_as_float(kUnwritten);
  float4 acc = make_float4(0, 0, 0, 0);
  ETAP_ROLLED
  for (int base = first; base <= last; base += kBatch * step) {
    float4 v[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      int const i = base + k * step;
      if (i <= last) v[k] = load_relaxed(partial_quads<Cfg>(p, piece.slot(i)) + quad);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      int const i = base + k * step;
      if (i > last) break;
      float4* const from = partial_quads<Cfg>(p, piece.slot(i)) + quad;
      while (!written(v[k])) v[k] = load_relaxed(from);
      *from = make_float4(unwritten, unwritten, unwritten, unwritten);
      float4 const w = *reinterpret_cast<float4 const*>(stats + i * Cfg::kRowTile + row);  // x, z: of two rows
      acc = make_float4(fmaf(v[k].x, w.x, acc.x), fmaf(v[k].y, w.z, acc.y), fmaf(v[k].z, w.x, acc.z),
                        fmaf(v[k].w, w.z, acc.w));
    }
  }
  return acc;
}

// This CTA's slice of a piece's rows.
template <class T, class Cfg>
ETAP_DEVICE void merge_slice(MlaDecodeParams const& p, PieceInfo const& piece, RowTarget const* rows,
                             MergeScratch<Cfg>& scratch, int thread) {
  constexpr int kAllQuads = Cfg::kRowTile * kLatentDim / 4;
  EvenCut const cut(kAllQuads, piece.num_parts);
  int const begin = cut.begin(piece.part), end = cut.begin(piece.part + 1);
  // Threads side by side on the slice; the others share its parts.
  int const longest = cut.base + min(cut.longer, 1);
  int const width = min(kConsumerThreads, max(8, 1 << (32 - __clz(longest - 1))));
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
        for (int i = thread + width; i < kConsumerThreads; i += width) {
          float4 const v = scratch.group_sum[i];
          acc = make_float4(acc.x + v.x, acc.y + v.y, acc.z + v.z, acc.w + v.w);
        }
      }
      sync_consumers();
    }
    if (quad < end && group == 0) store_quad<T, Cfg>(p, rows, quad, acc);
  }
}

template <class T, class Cfg>
ETAP_DEVICE void merge_pending(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int thread) {
  auto& scratch = *reinterpret_cast<MergeScratch<Cfg>*>(smem.ring);
  sync_consumers();  // the ring is idle, pending[] is written
  ETAP_ROLLED
  for (int i = 0; i < smem.control.num_pending; ++i) {
    PieceInfo const& piece = smem.control.pending[i];
    RowTarget const* const rows = smem.control.rows[i];
    read_statistics<Cfg>(p, piece, scratch.stats, thread);
    sync_consumers();
    merge_weights<Cfg>(p, piece, rows, scratch.stats, thread);
    sync_consumers();
    if (thread >= kConsumerThreads - 32) retire_statistics<Cfg>(p, piece, thread % 32);
    merge_slice<T>(p, piece, rows, scratch, thread);
    sync_consumers();
  }
}

}  // namespace etap
