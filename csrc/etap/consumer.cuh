// The consumer warpgroups: S^T = K Q^T, P^T = exp2(S^T scale - m), O^T += V^T P^T, tile by tile.
//
// A warpgroup owns every second tile of a piece, with statistics and O^T of its own, so that no tile needs both. Or
// (wide) both work on every tile: see consumer_wide.cuh, which uses the stages of this file.
//
// Fragment of a 64 x N result: thread t of a warpgroup holds M = 16 (t / 32) + (t % 32) / 4 (+ 8) and
// N = 8 j + 2 (t % 4) (+ 1), as d[4 j + 2 (M half) + (N parity)]. N is a query row; M is a key (S^T) or a latent
// column (O^T).
#pragma once

#include "storage.cuh"

namespace etap {

constexpr float kNoReference = -1e30f;  // reference maximum of a row that has seen no key; finite: no NaN arises
constexpr float kReferenceSlack = 8.0f; // scores may exceed the reference maximum by this much, in log2 units

template <class Cfg>
struct ConsumerState {
  static constexpr int kStats = Cfg::kScoreRows / 4;  // rows that one thread holds statistics of
  float out[Cfg::kOwnBlocks][Cfg::kPvRows / 2];       // O^T, in the order of latent_chunk; wide: of own_block
  float reference[kStats];                            // log2 units; the same in all threads of the warpgroup
  float sum[kStats];                                  // of this thread's keys alone
  bool fresh;                                         // no tile of this piece seen yet
  float4* partial;                                    // wide: where this thread's part of O^T goes, if it is a part
  int group, warp, lane;                              // warp: within the warpgroup

  // The query row of statistics i, among those that the warpgroup scores; the first of them in the row tile.
  ETAP_DEVICE int row_of(int i) const { return 8 * (i / 2) + 2 * (lane & 3) + (i & 1); }
  ETAP_DEVICE int first_row() const { return Cfg::kWide ? group * Cfg::kScoreRows : 0; }
  ETAP_DEVICE void reset() {
    fresh = true;
#pragma unroll
    for (int c = 0; !Cfg::kOverwrites && c < Cfg::kOwnBlocks; ++c) {
#pragma unroll
      for (int i = 0; i < Cfg::kPvRows / 2; ++i) out[c][i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kStats; ++i) {
      reference[i] = kNoReference;
      sum[i] = 0.0f;
    }
  }
};

// Of something that each row has, what the rows of statistics 2 j and 2 j + 1 have.
template <class Cfg>
ETAP_DEVICE float2 row_pair(float const (&of_rows)[Cfg::kRowTile], ConsumerState<Cfg> const& st, int j) {
  return *reinterpret_cast<float2 const*>(of_rows + st.row_of(2 * j));
}

// What the mask of a piece needs.
struct MaskBounds {
  int len;         // keys of the request
  int row0;        // first row of the row tile
  int causal_gap;  // if causal: a row of token t sees keys 0 .. causal_gap + t
};

// A thread's 16-byte vectors of a query row, kLanes threads to a row; zero past the request's rows.
template <class Cfg>
struct QueryVectors {
  static constexpr int kLanes = kConsumerThreads / Cfg::kRowTile;
  static constexpr int kLatent = kLatentChunks * 8 / kLanes, kRope = (8 + kLanes - 1) / kLanes;
  static_assert(kLanes <= 32);
  uint4 latent[kLatent], rope[kRope];  // a lane from 8 on has none of rope

  ETAP_DEVICE QueryVectors(MlaDecodeParams const& p, PieceInfo const& piece, int thread) {
    int const lane = thread % kLanes, row = piece.row_tile * Cfg::kRowTile + thread / kLanes;
#pragma unroll
    for (int k = 0; k < kLatent; ++k) latent[k] = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < kRope; ++k) rope[k] = make_uint4(0, 0, 0, 0);
    if (row >= piece.q_len * p.num_heads) return;
    auto const* from = static_cast<uint4 const*>(p.q_nope) +
                       row_offset(p, p.q_nope_stride, piece.request, piece.token0, row) / 8 + lane;
#pragma unroll
    for (int k = 0; k < kLatent; ++k) latent[k] = __ldg(from + k * kLanes);
    from = static_cast<uint4 const*>(p.q_rope) +
           row_offset(p, p.q_rope_stride, piece.request, piece.token0, row) / 8 + lane;
#pragma unroll
    for (int k = 0; k < kRope; ++k) {
      if (lane < 8) rope[k] = __ldg(from + k * kLanes);
    }
  }
  // To the chunks of Q, as they are.
  ETAP_DEVICE void store(SharedStorage<Cfg>& smem, int thread) const {
    int const r = thread / kLanes, lane = thread % kLanes;
#pragma unroll
    for (int k = 0; k < kLatent; ++k) {
      int const v = lane + k * kLanes;
      *reinterpret_cast<uint4*>(smem.query[v / 8] + swizzled(r, v % 8)) = latent[k];
    }
#pragma unroll
    for (int k = 0; k < kRope; ++k) {
      int const v = lane + k * kLanes;
      if (lane < 8) *reinterpret_cast<uint4*>(smem.query[kLatentChunks] + swizzled(r, v)) = rope[k];
    }
    cutlass::arch::fence_view_async_shared();
  }
};

// Fills the piece's row targets.
template <class Cfg>
ETAP_DEVICE void target_rows(MlaDecodeParams const& p, RowTarget* rows, PieceInfo const& piece, int thread) {
  if (thread >= Cfg::kRowTile) return;
  int const row = piece.row_tile * Cfg::kRowTile + thread;
  RowTarget target{-1, 0};
  if (row < piece.q_len * p.num_heads) {
    target.out = row_offset(p, p.out_stride, piece.request, piece.token0, row);
    target.lse = row_offset(p, p.lse_stride, piece.request, piece.token0, row);
  }
  rows[thread] = target;
}

// S^T of one tile. Each chunk is used as soon as it lands; the ring keeps the chunks. In two sums, of some chunks each:
// wgmma truncates what it adds to, and the less the smaller that is.
template <class T, class Cfg>
ETAP_DEVICE void score_tile(SharedStorage<Cfg>& smem, RingPosition<Cfg> at, int group, bool gathered,
                            float (&scores)[Cfg::kRowTile / 2]) {
  constexpr uint32_t kQueryChunk = Cfg::kRowTile * 128 / kDescriptorUnit, kStep = 32 / kDescriptorUnit;
  uint32_t const ring = descriptor_low(shared_address(smem.ring));
  uint32_t const query = descriptor_low(shared_address(smem.query));
  uint32_t q = query + kLatentChunks * kQueryChunk;  // the rope chunk is last in Q, first in a tile
  float others[Cfg::kRowTile / 2];
  auto const add_up = [&](int begin, int end, float (&sum)[Cfg::kRowTile / 2]) {
    ScaleOut scale = ScaleOut::Zero;
    ETAP_ROLLED
    for (int c = begin; c < end; ++c) {
      smem.control.full[at.slot].wait(at.parity);
      if (gathered) cutlass::arch::fence_view_async_shared();  // cp.async writes through the generic proxy
      uint32_t const k = ring + at.slot * (kChunkBytes / kDescriptorUnit);
      cute::warpgroup_arrive();
#pragma unroll
      for (int j = 0; j < kChunkCols / 16; ++j) {
        wgmma<T, Cfg::kRowTile, Major::K>(descriptor(k + j * kStep), descriptor(q + j * kStep), sum, scale);
        scale = ScaleOut::One;
      }
      cute::warpgroup_commit_batch();
      q = query + latent_chunk(c, group) * kQueryChunk;  // of the next chunk
      at.advance();
    }
  };
  add_up(0, kTileChunks / 2 + 1, scores);
  add_up(kTileChunks / 2 + 1, kTileChunks, others);
  cute::warpgroup_wait<0>();
#pragma unroll
  for (int i = 0; i < Cfg::kRowTile / 2; ++i) scores[i] += others[i];
}

// What brings scores to log2 units; those of an e4m3 cache are there already.
template <class Cfg>
ETAP_DEVICE float score_scale(MlaDecodeParams const& p) {
  return Cfg::kE4m3 ? 1.0f : p.scale_log2;
}

// Sets masked scores so that scale x score is -inf, whatever lay in the cache slot.
template <class Cfg>
ETAP_DEVICE void mask_scores(MlaDecodeParams const& p, MaskBounds const& mask, ConsumerState<Cfg> const& st, int tile,
                             float (&scores)[Cfg::kScoreRows / 2]) {
  float const masked = score_scale<Cfg>(p) < 0 ? INFINITY : -INFINITY;
  int const key = tile * kTileKeys + st.warp * 16 + st.lane / 4;
#pragma unroll
  for (int i = 0; i < ConsumerState<Cfg>::kStats; ++i) {
    int limit = mask.len;
    if (p.causal) {
      limit = min(limit, mask.causal_gap + p.heads_divmod.divide(mask.row0 + st.first_row() + st.row_of(i)) + 1);
    }
    float& a = scores[4 * (i / 2) + (i & 1)];
    float& b = scores[4 * (i / 2) + 2 + (i & 1)];
    if (key >= limit) a = masked;
    if (key + 8 >= limit) b = masked;
  }
}

// Zeroes the latent rows past the request's length: P is 0 there, but 0 x NaN is not. A warpgroup calls this, once none
// of its warps needs these rows for S^T; the others may still be reading them.
template <class Cfg>
ETAP_DEVICE void clear_tail(SharedStorage<Cfg>& smem, RingPosition<Cfg> at, int valid, ConsumerState<Cfg> const& st) {
  sync_group(st.group);
  ETAP_ROLLED
  for (int c = 0; c < Cfg::kRingLatent; ++c) {
    at.advance();
    ETAP_ROLLED
    for (int i = valid * 8 + st.warp * 32 + st.lane; i < kTileKeys * 8; i += 128) {
      *reinterpret_cast<uint4*>(smem.ring[at.slot] + i * 16) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Masks the scores of a warpgroup's own tile in which the length or the causal mask ends, and zeroes its keys past the
// length; cleared() is called behind that.
template <class Cfg, class Cleared>
ETAP_DEVICE void mask_tile(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st,
                           MaskBounds const& mask, RingPosition<Cfg> at, int tile,
                           float (&scores)[Cfg::kScoreRows / 2], Cleared const& cleared) {
  int const end = (tile + 1) * kTileKeys;
  if (end > mask.len || (p.causal && end > mask.causal_gap + 1)) {
    mask_scores(p, mask, st, tile, scores);
    if (end > mask.len) {
      clear_tail(smem, at, mask.len - tile * kTileKeys, st);
      cleared();
    }
  }
}

// Fragments of P^T, of rows from 8 `block` on, to their place.
template <class Cfg, int Blocks>
ETAP_DEVICE void store_probabilities(ConsumerState<Cfg> const& st, uint32_t prob, int block,
                                     uint32_t const (&packed)[Cfg::kPParts][Blocks][2]) {  // [part][block][key half]
  // A lane addresses row lane % 8 of the matrix lane / 8.
  uint32_t const column = 2 * st.warp + ((st.lane >> 3) & 1), upper = st.lane >> 4, row8 = st.lane & 7;
  if constexpr (Blocks == 2) {
#pragma unroll
    for (int part = 0; part < Cfg::kPParts; ++part) {
      auto const& b = packed[part];
      store_matrices(prob + swizzled(part * Cfg::kRowTile + (block + upper) * 8 + row8, column), b[0][0], b[0][1],
                     b[1][0], b[1][1]);
    }
  } else if constexpr (Cfg::kPParts == 2) {
    store_matrices(prob + swizzled(upper * Cfg::kRowTile + row8, column), packed[0][0][0], packed[0][0][1],
                   packed[1][0][0], packed[1][0][1]);
  } else {
    store_matrices(prob + swizzled(row8, column), packed[0][0][0], packed[0][0][1]);
  }
}

// Two probabilities in 16-bit parts.
template <class T, class Cfg, int Blocks>
ETAP_DEVICE void split_pair(float first, float second, uint32_t (&packed)[Cfg::kPParts][Blocks][2], int block,
                            int half) {
  packed[0][block][half] = pack_pair(first, second, T{});
  if constexpr (Cfg::kPParts == 2) {
    float2 const high = unpack_pair(packed[0][block][half], T{});
    packed[1][block][half] = pack_pair(first - high.x, second - high.y, T{});
  }
}

// P^T of this warp's keys to shared memory, in 16-bit parts; returns whether a score exceeds its reference by more than
// the slack. tile_sum gets this thread's sums. `prob`: where the first row that the warpgroup scores has its place.
template <class T, class Cfg>
ETAP_DEVICE bool write_probabilities(MlaDecodeParams const& p, ConsumerState<Cfg> const& st, uint32_t prob,
                                     float const (&scores)[Cfg::kScoreRows / 2],
                                     float (&tile_sum)[ConsumerState<Cfg>::kStats]) {
  constexpr int kStep = Cfg::kProbBlocks;
  bool exceeds = false;
#pragma unroll
  for (int block = 0; block < Cfg::kScoreRows / 8; block += kStep) {
    uint32_t packed[Cfg::kPParts][kStep][2];  // [part][block][key half]
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      int const j = block + k;
      float e[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const x = fmaf(scores[4 * j + i], score_scale<Cfg>(p), -st.reference[2 * j + (i & 1)]);
        exceeds |= x > kReferenceSlack;
        e[i] = exp2_approx(x);
      }
      tile_sum[2 * j] = e[0] + e[2];
      tile_sum[2 * j + 1] = e[1] + e[3];
#pragma unroll
      for (int half = 0; half < 2; ++half) split_pair<T, Cfg>(e[2 * half], e[2 * half + 1], packed, k, half);
    }
    store_probabilities<Cfg>(st, prob, block, packed);
  }
  cutlass::arch::fence_view_async_shared();
  return exceeds;
}

ETAP_DEVICE float& warp_entry(float4& of_warps, int warp) { return reinterpret_cast<float*>(&of_warps)[warp]; }

// Raises the reference maximum to cover the tile, and rescales the sums under the old one; factor: by what.
template <class Cfg>
ETAP_DEVICE void raise_maximum(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                               float const (&scores)[Cfg::kScoreRows / 2],
                               float (&factor)[ConsumerState<Cfg>::kStats]) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
  auto& shared = smem.control.warp_stat[st.group];
#pragma unroll
  for (int i = 0; i < kStats; ++i) {
    float const scale = score_scale<Cfg>(p);
    float const a = scores[4 * (i / 2) + (i & 1)] * scale, b = scores[4 * (i / 2) + 2 + (i & 1)] * scale;
    float top = fmaxf(a, b);
#pragma unroll
    for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    if (st.lane < 4) warp_entry(shared[st.row_of(i)], st.warp) = top;
  }
  sync_group(st.group);
#pragma unroll
  for (int i = 0; i < kStats; ++i) {
    float4 const tops = shared[st.row_of(i)];
    float const m = fmaxf(fmaxf(fmaxf(st.reference[i], tops.x), fmaxf(tops.y, tops.z)), tops.w);
    factor[i] = exp2_approx(st.reference[i] - m);
    st.reference[i] = m;
    st.sum[i] *= factor[i];
  }
}

// ... and O^T with them.
template <class Cfg>
ETAP_DEVICE void raise_reference(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                 float const (&scores)[Cfg::kScoreRows / 2]) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
  float factor[kStats];
  raise_maximum(p, smem, st, scores, factor);
  if (!st.fresh) {
#pragma unroll
    for (int c = 0; c < kLatentChunks; ++c) {
#pragma unroll
      for (int i = 0; i < Cfg::kPvRows / 2; ++i) st.out[c][i] *= factor[(2 * (i / 4) + (i & 1)) % kStats];
    }
  }
  st.fresh = false;
}

// Writes a tile's P^T, again once its reference maximum is raised if a score asks for that, and adds up the sums:
// write(tile_sum) returns whether one does, raise() is for all `threads` that meet at the barrier.
template <class Cfg, class Raise, class Write>
ETAP_DEVICE void write_raising(ConsumerState<Cfg>& st, uint32_t barrier, uint32_t threads, Raise const& raise,
                               Write const& write) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
  float tile_sum[kStats];
  bool raises = st.fresh;  // the first tile sets the reference; a later one rarely has to
  ETAP_ROLLED
  do {
    if (raises) raise();
    bool const exceeds = write(tile_sum);
    raises = sync_or(barrier, threads, exceeds);
  } while (raises);
#pragma unroll
  for (int i = 0; i < kStats; ++i) st.sum[i] += tile_sum[i];
}

// ... of a tile of the warpgroup's own.
template <class T, class Cfg>
ETAP_DEVICE void write_own_probabilities(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                         uint32_t prob, float const (&scores)[Cfg::kScoreRows / 2]) {
  write_raising(
      st, kBarrierGroup0 + st.group, 128, [&] { raise_reference(p, smem, st, scores); },
      [&](float (&tile_sum)[ConsumerState<Cfg>::kStats]) {
        return write_probabilities<T>(p, st, prob, scores, tile_sum);
      });
}

// O^T += V^T P^T for the chunks this warpgroup owns (wide: every second one, see own_block), freeing each chunk behind
// it. `at`: the tile's rope chunk. `before`: Zero if there was no tile before. `meanwhile` is called with wgmmas under
// way.
template <class T, class Cfg, class Meanwhile>
ETAP_DEVICE void accumulate_tile(SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st, RingPosition<Cfg> at, uint32_t prob,
                                 ScaleOut before, Meanwhile const& meanwhile) {
  at.advance(Cfg::kWide ? 1 + st.group : 1);
  uint32_t const ring = descriptor_low(shared_address(smem.ring)), p_low = descriptor_low(prob);
  uint32_t previous = at.slot;
  cute::warpgroup_arrive();
#pragma unroll
  for (int c = 0; c < Cfg::kOwnBlocks; ++c) {
    uint32_t const v = ring + at.slot * (kChunkBytes / kDescriptorUnit);
#pragma unroll
    for (int part = 0; part < (Cfg::kConcatP ? 1 : Cfg::kPParts); ++part) {
#pragma unroll
      for (int j = 0; j < kTileKeys / 16; ++j) {
        wgmma<T, Cfg::kPvRows, Major::MN>(descriptor(v + j * (16 * 128 / kDescriptorUnit)),
                                          descriptor(p_low + (part * Cfg::kRowTile * 128 + j * 32) / kDescriptorUnit),
                                          st.out[c], part + j == 0 ? before : ScaleOut::One);
      }
    }
    cute::warpgroup_commit_batch();
    if (c > 0) {
      cute::warpgroup_wait<1>();
      free_latent(smem, previous);
    }
    previous = at.slot;
    at.advance(Cfg::kWide ? 2 : 1);
  }
  meanwhile();
  cute::warpgroup_wait<0>();
  free_latent(smem, previous);
}

// One tile of a warpgroup that owns whole tiles. `buffer` alternates per tile.
template <class T, class Cfg>
ETAP_DEVICE void consume_tile(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                              MaskBounds const& mask, RingPosition<Cfg> at, int tile, int buffer) {
  float scores[Cfg::kRowTile / 2];
  await_previous_pass(smem, at.ahead(Cfg::kForeignFirst), Cfg::kForeignChunks, st.lane);
  score_tile<T>(smem, at, st.group, p.box_rows == 0, scores);
  trace(kScored, st.fresh && st.group + st.warp + st.lane == 0);
  free_rope(smem, at.slot);
  mask_tile(p, smem, st, mask, at, tile, scores, [] {});
  uint32_t const prob = shared_address(smem.prob[2 * st.group + buffer]);
  write_own_probabilities<T>(p, smem, st, prob, scores);
  accumulate_tile<T>(smem, st, at, prob, ScaleOut::One, [] {});
}

}  // namespace etap
