// Merge of partial results inside the launch: every CTA that holds a part of some rows merges an equal slice of them.
// All CTAs are resident (the launch is cooperative), so the wait for the other parts ends.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "epilogue.cuh"

namespace etap {

template <class Cfg>
struct MergeScratch {  // lies over the ring, Q and P^T, which are idle by then
  static constexpr int kStage = 16, kStatQuads = Cfg::kRowTile / 2;
  static constexpr int kStatRows = Cfg::kRowTile + 2;  // two more: lanes that read a row's parts meet in fewer banks
  float4 stage[kStage][kConsumerThreads];  // quads of parts on their way in, each read by the thread that asked for it
  float4 group_sum[kConsumerThreads];
  float scale[Cfg::kRowTile];
  float2 stats[kMaxCtas][kStatRows];       // per part and row: maximum and sum; then weight in x
  static_assert(sizeof(float4) * (kStage + 1) * kConsumerThreads + 4 * Cfg::kRowTile +
                    sizeof(float2) * kMaxCtas * kStatRows <= Cfg::kSharedBytes - Cfg::kControlBytes);

  // The i-th two rows of all parts.
  ETAP_DEVICE float4& stat_quad(uint32_t i) {
    return *reinterpret_cast<float4*>(&stats[i / kStatQuads][2 * (i % kStatQuads)]);
  }
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
ETAP_DEVICE float4 const* stat_quad(PartialBuffer<Cfg> const& buffer, Piece const& piece, uint32_t i) {
  constexpr uint32_t kStatQuads = MergeScratch<Cfg>::kStatQuads;
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

// Writes one quad of the output.
template <class T, class Cfg>
ETAP_DEVICE void store_quad(MlaDecodeParams const& p, RowTarget const* rows, float const* scale, uint32_t quad,
                            float4 v) {
  using Quads = PartialQuads<Cfg>;
  int const column = quad % 128 / 32 * 16 + fragment_column<Cfg>(quad % 32), row = Quads::first_row(quad);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    int64_t const target = rows[row + e].out;
    if (target < 0) continue;
    float const low = (e ? v.y : v.x) * scale[row + e], high = (e ? v.w : v.z) * scale[row + e];
    int64_t const at = target + block_at<Cfg>(Quads::block(quad)) * kChunkCols + column;
    if (p.out_fp32) {
      float* const out = static_cast<float*>(p.out) + at;
      out[0] = low;
      out[kColumnStep<Cfg>] = high;
    } else {
      T* const out = static_cast<T*>(p.out) + at;
      out[0] = T(low);
      out[kColumnStep<Cfg>] = T(high);
    }
  }
}

// What one thread adds up of a CTA's slice of a piece: `blocks` quads, each over the parts group, group + groups, ...
template <class Cfg>
struct SliceShare {
  static constexpr int kStep = 2 * PartialBuffer<Cfg>::kSlotBytes / sizeof(float4);  // quads from a part to the next
  float4 const *first, *others;  // quads of part 0; of part i > 0, kStep i further on
  Tag tag;
  int num_parts, end;            // of the piece; of the slice
  int quad0, width, blocks;      // block b is quad0 + b width
  int group, groups, own_parts;  // of the threads that share a quad's parts; groups <= parts

  ETAP_DEVICE SliceShare(PartialBuffer<Cfg> const& buffer, Piece const& piece, int thread)
      : tag(buffer.tag), num_parts(piece.num_parts) {
    EvenCut const cut(PartialQuads<Cfg>::kCount, num_parts);
    int const begin = cut.begin(piece.part), longest = cut.base + min(cut.longer, 1);
    int const log_width = min(8, max(3, 32 - __clz(longest - 1)));
    end = cut.begin(piece.part + 1);
    width = 1 << log_width;
    group = thread >> log_width;
    groups = kConsumerThreads >> log_width;
    own_parts = (num_parts - group + groups - 1) >> (31 - __clz(kConsumerThreads) - log_width);
    blocks = groups > 1 ? 1 : (longest + width - 1) >> log_width;
    quad0 = begin + (thread & (width - 1));
    first = buffer.quads(piece.first_slot);
    others = buffer.quads(2 * piece.first_cta);
    asm volatile("" : "+l"(first), "+l"(others));
    keep(quad0), keep(blocks), keep(end);
  }
  ETAP_DEVICE int quad(int block) const { return min(quad0 + block * width, end - 1); }
  ETAP_DEVICE float4 const* at(int part, int quad) const {
    return part == 0 ? first + quad : others + (part * kStep + quad);
  }
};

// Adds one of a quad's parts.
template <class Cfg>
ETAP_DEVICE void add_part(QuadSum& sum, MergeScratch<Cfg> const& scratch, Tag tag, float4 v, uint32_t part,
                          uint32_t quad) {
  int const row = PartialQuads<Cfg>::first_row(quad);
  float4 const weights = *reinterpret_cast<float4 const*>(&scratch.stats[part][row]);  // x and z
  sum.add(v, tag, weights.x, weights.z);
}

// Asks again for those of a quad's staged parts that were not there yet; whether there were any.
template <class Share>
ETAP_DEVICE bool ask_again(Share const& share, float4* stage, int part, int part_end, int quad) {
  bool missing = false;
  ETAP_ROLLED
  for (; part < part_end; part += share.groups, stage += kConsumerThreads) {
    if (share.tag.written(*stage)) continue;
    copy_async(stage, share.at(part, quad));
    missing = true;
  }
  return missing;
}

// The sum of the threads that share a quad's parts, in the first group's.
template <class Cfg>
ETAP_DEVICE void sum_groups(MergeScratch<Cfg>& scratch, int width, QuadSum& sum, int thread) {
  ETAP_ROLLED
  for (int d = width; d < 32; d *= 2) sum.add(sum.of_lane_below(d));
  scratch.group_sum[thread] = sum.quad;
  sync_consumers();
  int const step = max(width, 32);
  if (thread >= width) return;
  ETAP_ROLLED
  for (int i = thread + step; i < kConsumerThreads; i += step) sum.add(scratch.group_sum[i]);
}

// Statistics of all parts to shared memory, in two steps.
template <class Cfg>
ETAP_DEVICE void ask_statistics(PartialBuffer<Cfg> const& buffer, Piece const& piece, MergeScratch<Cfg>& scratch,
                                int thread) {
  ETAP_ROLLED
  for (int i = thread; i < piece.num_parts * MergeScratch<Cfg>::kStatQuads; i += kConsumerThreads) {
    copy_async(&scratch.stat_quad(i), stat_quad(buffer, piece, i));
  }
}
template <class Cfg>
ETAP_DEVICE void await_statistics(PartialBuffer<Cfg> const& buffer, Piece const& piece, MergeScratch<Cfg>& scratch,
                                  int thread) {
  await_copies();
  ETAP_ROLLED
  for (int i = thread; i < piece.num_parts * MergeScratch<Cfg>::kStatQuads; i += kConsumerThreads) {
    float4& quad = scratch.stat_quad(i);
    quad = await_written(quad, stat_quad(buffer, piece, i));
  }
}

// This CTA's slice of a piece's rows. What can be is worked out while something is on its way: instructions are what
// this takes its time for. Partial results are read once their statistics are there, then most likely all at once; a
// word that was not there yet shows in its sum, and is asked for again.
template <class T, class Cfg>
ETAP_DEVICE void merge_slice(MlaDecodeParams const& p, PartialBuffer<Cfg> const& buffer, Piece const& piece,
                             RowTarget const* rows, float value_scale, MergeScratch<Cfg>& scratch, int thread) {
  constexpr int kStage = MergeScratch<Cfg>::kStage;
  SliceShare<Cfg> const share(buffer, piece, thread);
  // A round: so many parts of so many quads that they fit the stage.
  int const round_parts = min(share.own_parts, kStage);
  int round_blocks = kStage >> (32 - __clz(round_parts - 1)), part_step = round_parts * share.groups;
  keep(round_blocks), keep(part_step);
  await_statistics(buffer, piece, scratch, thread);
  sync_consumers();
  trace(kStatsThere, thread == 0);
  bool weighed = false;
  ETAP_ROLLED
  for (int block0 = 0; block0 < share.blocks; block0 += round_blocks) {
    int const block_end = min(block0 + round_blocks, share.blocks);
    QuadSum sum;
    sum.clear();
    ETAP_ROLLED
    for (int part0 = share.group; part0 < share.num_parts; part0 += part_step) {
      int const part_end = min(part0 + part_step, share.num_parts);
      float4* to = &scratch.stage[0][thread];
      ETAP_ROLLED
      for (int block = block0; block < block_end; ++block) {
        int const quad = share.quad(block);
        ETAP_ROLLED
        for (int part = part0; part < part_end; part += share.groups, to += kConsumerThreads) {
          copy_async(to, share.at(part, quad));
        }
      }
      if (!weighed) {
        merge_weights<Cfg>(p, piece, rows, value_scale, scratch, thread);
        sync_consumers();
        weighed = true;
      }
      await_copies();
      float4* from = &scratch.stage[0][thread];
      ETAP_ROLLED
      for (int block = block0; block < block_end; ++block) {
        int quad = share.quad(block);
        QuadSum const before = sum;
        float4* const staged = from;
        while (true) {
          ETAP_ROLLED
          for (int part = part0; part < part_end; part += share.groups, from += kConsumerThreads) {
            add_part(sum, scratch, share.tag, *from, part, quad);
          }
          if (sum.is_there() || !ask_again(share, staged, part0, part_end, quad)) break;
          await_copies();
          sum = before, from = staged;
        }
        if (part_end < share.num_parts) continue;
        keep(quad);
        if (share.groups > 1) break;  // its one block
        if (share.quad0 + block * share.width < share.end) store_quad<T, Cfg>(p, rows, scratch.scale, quad, sum.quad);
        sum.clear();
      }
    }
    if (share.groups > 1) {
      sum_groups(scratch, share.width, sum, thread);
      int quad = share.quad0;
      keep(quad);
      if (thread < share.width && quad < share.end) store_quad<T, Cfg>(p, rows, scratch.scale, quad, sum.quad);
    }
  }
}

template <class T, class Cfg>
ETAP_DEVICE void merge_pending(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int thread) {
  auto& scratch = *reinterpret_cast<MergeScratch<Cfg>*>(smem.ring);
  PartialBuffer<Cfg> const buffer(p, smem.control.epoch);
  ETAP_ROLLED
  for (int i = 0; i < smem.control.num_pending; ++i) {
    sync_consumers();  // the ring is idle, pending[] is written; the scratch may be written again
    Piece const piece = smem.control.pending[i];
    ask_statistics(buffer, piece, scratch, thread);
    merge_slice<T>(p, buffer, piece, smem.control.rows[i], value_scale(smem, i), scratch, thread);
  }
}

}  // namespace etap
