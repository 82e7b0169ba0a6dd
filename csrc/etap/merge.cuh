// Merge of partial results inside the launch: every CTA that holds a part of some rows merges an equal slice of them.
// All CTAs are resident (the launch is cooperative), so the wait for the other parts ends.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "epilogue.cuh"

namespace etap {

template <class Cfg>
struct MergeScratch {  // lies over the ring, Q and P^T, which are idle by then
  static constexpr int kStage = 16, kStatQuads = Cfg::kRowTile / 2;
  float4 stage[kStage][kConsumerThreads];  // quads of parts on their way in, each read by the thread that asked for it
  float4 group_sum[kConsumerThreads];
  float scale[Cfg::kRowTile];
  float2 stats[kMaxCtas][Cfg::kRowTile];   // per part and row: maximum and sum; then weight in x
  static_assert(sizeof(float4) * (kStage + 1) * kConsumerThreads + 4 * Cfg::kRowTile +
                    sizeof(float2) * kMaxCtas * Cfg::kRowTile <= Cfg::kSharedBytes - Cfg::kControlBytes);
};

// CuTe's statements do not tell the compiler that they write memory; these two do.
ETAP_DEVICE void copy_async(float4* to, float4 const* from) {
  cute::SM80_CP_ASYNC_CACHEGLOBAL<float4>::copy(*from, *to);
  asm volatile("" ::: "memory");
}
ETAP_DEVICE void await_copies() {
  cute::cp_async_fence();
  cute::cp_async_wait<0>();
  asm volatile("" ::: "memory");
}

// What copy_async brought, or what is there once it is there.
ETAP_DEVICE float4 await_written(float4 v, float4 const* from) {
  for (int tries = 0; !written(v); ++tries) {
    if (tries > 4) __nanosleep(40);
    v = load_relaxed(from);
  }
  return v;
}

template <class Cfg>
ETAP_DEVICE float4 const* stat_quad(PartialBuffer<Cfg> const& buffer, Piece const& piece, int i) {
  constexpr int kStatQuads = MergeScratch<Cfg>::kStatQuads;
  return reinterpret_cast<float4 const*>(buffer.stats(piece.slot(i / kStatQuads))) + i % kStatQuads;
}

// Weights of the parts, and the scale of each row. One row belongs to kConsumerThreads / kRowTile consecutive lanes.
template <class Cfg>
ETAP_DEVICE void merge_weights(MlaDecodeParams const& p, Piece const& piece, RowTarget const* rows, float value_scale,
                               MergeScratch<Cfg>& scratch, int thread) {
  constexpr int kLanes = kConsumerThreads / Cfg::kRowTile;
  static_assert(kLanes <= 32);
  int const r = thread / kLanes, first = thread % kLanes;
  float top = kNoReference, sum = 0.0f;
  ETAP_ROLLED
  for (int i = first; i < piece.num_parts; i += kLanes) top = fmaxf(top, scratch.stats[i][r].x);
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
  ETAP_ROLLED
  for (int i = first; i < piece.num_parts; i += kLanes) {
    float2& v = scratch.stats[i][r];
    v.x = exp2_approx(v.x - top);
    sum = fmaf(v.x, v.y, sum);
  }
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (first > 0) return;
  scratch.scale[r] = sum > 0.0f ? value_scale / sum : 0.0f;
  if (piece.part == 0) write_lse(p, rows[r], top, sum);
}

// Writes one quad (see PartialBuffer) of the output.
template <class T, class Cfg>
ETAP_DEVICE void store_quad(MlaDecodeParams const& p, RowTarget const* rows, float const* scale, int quad, float4 v) {
  constexpr int kQuads = Cfg::kRowTile / 8;
  int const lane = quad % 32, chunk = quad / (128 * kQuads);
  int const column = chunk * kChunkCols + quad % 128 / 32 * 16 + fragment_column<Cfg>(lane);
  int const row = 8 * (quad / 128 % kQuads) + 2 * (lane & 3);
  float const values[2][2] = {{v.x, v.z}, {v.y, v.w}};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    int64_t const target = rows[row + e].out;
    float const low = values[e][0] * scale[row + e], high = values[e][1] * scale[row + e];
    if (target < 0) continue;
    if (p.out_fp32) {
      float* const out = static_cast<float*>(p.out) + target + column;
      out[0] = low;
      out[kColumnStep<Cfg>] = high;
    } else {
      T* const out = static_cast<T*>(p.out) + target + column;
      out[0] = T(low);
      out[kColumnStep<Cfg>] = T(high);
    }
  }
}

// Goes over what one thread adds up of a slice: of `blocks` quads in turn, the parts first, first + step, ...
struct MergeCursor {
  int block, part;
  ETAP_DEVICE bool advance(int first, int step, int num_parts) {  // true: that was the block's last part
    part += step;
    if (part < num_parts) return false;
    part = first;
    ++block;
    return true;
  }
};

// Statistics of all parts to shared memory, then weights.
template <class Cfg>
ETAP_DEVICE void weigh_parts(MlaDecodeParams const& p, PartialBuffer<Cfg> const& buffer, Piece const& piece,
                             RowTarget const* rows, float value_scale, MergeScratch<Cfg>& scratch, int thread) {
  float4* const stats = reinterpret_cast<float4*>(scratch.stats);
  int const quads = piece.num_parts * MergeScratch<Cfg>::kStatQuads;
  ETAP_ROLLED
  for (int i = thread; i < quads; i += kConsumerThreads) copy_async(stats + i, stat_quad(buffer, piece, i));
  await_copies();
  ETAP_ROLLED
  for (int i = thread; i < quads; i += kConsumerThreads) {
    stats[i] = await_written(stats[i], stat_quad(buffer, piece, i));
  }
  sync_consumers();
  trace(kStatsThere, thread == 0);
  merge_weights<Cfg>(p, piece, rows, value_scale, scratch, thread);
}

// This CTA's slice of a piece's rows.
template <class T, class Cfg>
ETAP_DEVICE void merge_slice(MlaDecodeParams const& p, PartialBuffer<Cfg> const& buffer, Piece const& piece,
                             RowTarget const* rows, float value_scale, MergeScratch<Cfg>& scratch, int thread) {
  using Scratch = MergeScratch<Cfg>;
  weigh_parts(p, buffer, piece, rows, value_scale, scratch, thread);
  EvenCut const cut(PartialBuffer<Cfg>::kQuads, piece.num_parts);
  int const begin = cut.begin(piece.part), end = cut.begin(piece.part + 1);
  // Threads side by side on the slice; the others share its parts.
  int const longest = cut.base + min(cut.longer, 1);
  int const log_width = min(8, max(3, 32 - __clz(longest - 1))), width = 1 << log_width;
  int const groups = kConsumerThreads >> log_width, group = thread >> log_width;  // groups <= parts
  int const blocks = groups > 1 ? 1 : (longest + width - 1) >> log_width, quad0 = begin + (thread & (width - 1));
  auto quad_of = [&](MergeCursor const& c) { return min(quad0 + c.block * width, end - 1); };
  MergeCursor at{0, group};
  float4 acc = make_float4(0, 0, 0, 0);
  bool weighed = false;
  ETAP_ROLLED
  do {
    MergeCursor next = at;
    ETAP_ROLLED
    for (int k = 0; k < Scratch::kStage && next.block < blocks; ++k) {
      copy_async(&scratch.stage[k][thread], buffer.quads(piece.slot(next.part)) + quad_of(next));
      next.advance(group, groups, piece.num_parts);
    }
    if (!weighed) sync_consumers();
    weighed = true;
    await_copies();
    ETAP_ROLLED
    for (int k = 0; k < Scratch::kStage && at.block < blocks; ++k) {
      int const quad = quad_of(at), row = 8 * (quad / 128 % (Cfg::kRowTile / 8)) + 2 * (quad & 3), block = at.block;
      float4 const w = *reinterpret_cast<float4 const*>(&scratch.stats[at.part][row]);  // x, z: of two rows
      float4 const v = await_written(scratch.stage[k][thread], buffer.quads(piece.slot(at.part)) + quad);
      acc = make_float4(fmaf(v.x, w.x, acc.x), fmaf(v.y, w.z, acc.y), fmaf(v.z, w.x, acc.z), fmaf(v.w, w.z, acc.w));
      if (at.advance(group, groups, piece.num_parts) && groups == 1) {
        if (quad0 + block * width < end) store_quad<T, Cfg>(p, rows, scratch.scale, quad, acc);
        acc = make_float4(0, 0, 0, 0);
      }
    }
  } while (at.block < blocks);
  if (groups == 1) return;
  scratch.group_sum[thread] = acc;
  sync_consumers();
  if (group > 0 || quad0 >= end) return;
  ETAP_ROLLED
  for (int i = thread + width; i < kConsumerThreads; i += width) {
    float4 const v = scratch.group_sum[i];
    acc = make_float4(acc.x + v.x, acc.y + v.y, acc.z + v.z, acc.w + v.w);
  }
  store_quad<T, Cfg>(p, rows, scratch.scale, quad0, acc);
}

template <class T, class Cfg>
ETAP_DEVICE void merge_pending(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int thread) {
  auto& scratch = *reinterpret_cast<MergeScratch<Cfg>*>(smem.ring);
  PartialBuffer<Cfg> const buffer(p, smem.control.epoch);
  ETAP_ROLLED
  for (int i = 0; i < smem.control.num_pending; ++i) {
    sync_consumers();  // the ring is idle, pending[] is written; the scratch may be written again
    Piece const piece = smem.control.pending[i];
    merge_slice<T>(p, buffer, piece, smem.control.rows[i], value_scale(smem, i), scratch, thread);
  }
}

}  // namespace etap
