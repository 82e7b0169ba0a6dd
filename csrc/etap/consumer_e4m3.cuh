// The consumer warpgroups for an e4m3 cache: as in consumer.cuh, but the tile goes through registers, widened to fp16.
//
// Two groups of fragments take turns: while wgmma works on one, the other is widened, and the bytes of the next are
// on their way from shared memory. A chunk is free as soon as its bytes are in registers, before wgmma has run.
#pragma once

#include "consumer.cuh"
#include "e4m3.cuh"

namespace etap {

// The largest magnitude of eight 16-bit values, as bits without the sign: they order as the magnitudes do.
ETAP_DEVICE uint32_t largest_bits(uint4 v) {
  uint32_t const a = __vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu), b = __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu);
  uint32_t const top = __vmaxu2(a, b);
  return max(top & 0xffffu, top >> 16);
}

ETAP_DEVICE int exponent_of(float x) { return __float_as_uint(x) >> 23 & 0xff; }  // biased: |x| < 2^(this - 126)

// A row of Q is brought to fp16 as q 2^e, where its rope part is multiplied by r = kpe_scale / ckv_scale first; scores
// times ckv_scale 2^-e are then the row's. e puts the largest magnitude into [2^13, 2^15).
//
// No finite query overflows: 2^15 < 65504, and |S| <= 576 x 2^15 x 448 < 2^33. Nothing is lost: bf16 and fp16 have no
// more than fp16's 11 bits, so q 2^e is exact down to 2^-14, and below within 2^-25, which is 2^-38 of the row's
// largest; r q 2^e goes in two fp16 parts, 22 bits. S, in fp32, is not that good. 2^e and 2^-e are normal: e is kept in
// -126 to 126. At 126 a row's magnitudes are below 2^-111, and scales that make its scores matter overflow elsewhere;
// at -126, so does r q in fp32.
struct QueryScale {
  float up, down;  // 2^e, 2^-e

  // From the largest exponent_of, or what stands for it.
  explicit ETAP_DEVICE QueryScale(int exponent) {
    exponent = min(max(exponent, 15), 267);
    up = __uint_as_float((268 - exponent) << 23);
    down = __uint_as_float((exponent - 14) << 23);
  }
};

// Eight columns of a row, in fp16, to its chunk of Q. Columns are permuted as e4m3.cuh wants: position 2q + e of each
// 16 holds column 4q + e, position 8 + 2q + e column 4q + 2 + e.
ETAP_DEVICE void store_query(uint8_t* chunk, int row, int vector, uint32_t const (&pairs)[4]) {
  uint8_t* const half = chunk + vector % 2 * 8;
  *reinterpret_cast<uint2*>(half + swizzled(row, vector / 2 * 2)) = make_uint2(pairs[0], pairs[2]);
  *reinterpret_cast<uint2*>(half + swizzled(row, vector / 2 * 2 + 1)) = make_uint2(pairs[1], pairs[3]);
}

// The largest exponent_of of this thread's columns of Q.
template <class T, class Cfg>
ETAP_DEVICE int latent_exponent(QueryVectors<Cfg> const& q) {
  uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < q.kLatent; ++k) largest = max(largest, largest_bits(q.latent[k]));
  return exponent_of(unpack_pair(largest, T{}).x);
}
template <class T, class Cfg>
ETAP_DEVICE int rope_exponent(QueryVectors<Cfg> const& q) {
  return exponent_of(unpack_pair(largest_bits(q.rope[0]), T{}).x);
}

// The largest among the threads of a row.
template <class Cfg>
ETAP_DEVICE int largest_of_row(int x) {
#pragma unroll
  for (int d = QueryVectors<Cfg>::kLanes / 2; d > 0; d /= 2) x = max(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

// A 16-byte vector of a row, times `up`, to its chunk of Q.
template <class T>
ETAP_DEVICE void store_query_scaled(uint8_t* chunk, int row, int vector, uint4 v, float up) {
  uint32_t const in[4] = {v.x, v.y, v.z, v.w};
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 const x = unpack_pair(in[i], T{});
    pairs[i] = pack_pair(x.x * up, x.y * up, __half{});
  }
  store_query(chunk, row, vector, pairs);
}

// Finite, or scores of 0 would become NaN.
ETAP_DEVICE float finite_factor(float x) { return fminf(fmaxf(x, -3e38f), 3e38f); }

// ckv_scale and kpe_scale of a request.
ETAP_DEVICE float latent_scale(MlaDecodeParams const& p, int request) {
  return p.ckv_scale_data ? __ldg(p.ckv_scale_data + request * p.ckv_scale_stride) : p.ckv_scale;
}
ETAP_DEVICE float rope_scale(MlaDecodeParams const& p, int request) {
  return p.kpe_scale_data ? __ldg(p.kpe_scale_data + request * p.kpe_scale_stride) : p.kpe_scale;
}

// Loads the piece's query rows as fp16, scaled.
template <class T, class Cfg>
ETAP_DEVICE void load_query_e4m3(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, PieceInfo const& piece,
                                 int thread) {
  using Vectors = QueryVectors<Cfg>;
  int const r = thread / Vectors::kLanes, lane = thread % Vectors::kLanes;
  Vectors const q(p, piece, thread);
  float const ckv_scale = latent_scale(p, piece.request), kpe_scale = rope_scale(p, piece.request);
  float const ratio = kpe_scale / ckv_scale;
  QueryScale const scale(largest_of_row<Cfg>(
      max(latent_exponent<T>(q), rope_exponent<T>(q) + exponent_of(ratio) - 126)));
  if (thread == 0) smem.control.value_scale[piece.table] = ckv_scale;
  if (lane == 0) smem.control.row_scale[r] = finite_factor(p.scale_log2 * ckv_scale * scale.down);
#pragma unroll
  for (int k = 0; k < Vectors::kLatent; ++k) {
    int const v = lane + k * Vectors::kLanes;
    store_query_scaled<T>(smem.query[v / 8], r, v % 8, q.latent[k], scale.up);
  }
  if (lane < 8) {
    uint32_t const in[4] = {q.rope[0].x, q.rope[0].y, q.rope[0].z, q.rope[0].w};
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 const x = unpack_pair(in[i], T{});
      float const a = x.x * scale.up * ratio, b = x.y * scale.up * ratio;
      high[i] = pack_pair(a, b, __half{});
      float2 const rounded = unpack_pair(high[i], __half{});
      low[i] = pack_pair(a - rounded.x, b - rounded.y, __half{});
    }
    store_query(smem.query[kLatentChunks], r, lane, high);
    store_query(smem.query[kLatentChunks + 1], r, lane, low);
  }
  cutlass::arch::fence_view_async_shared();
}

// The bytes and fragments in flight in one warpgroup.
struct E4m3Pipeline {
  uint32_t bytes[8];  // of the next group
  Group a[2];         // of the two groups that wgmma may be working on
};

template <class Cfg>
ETAP_DEVICE uint32_t chunk_address(SharedStorage<Cfg>& smem, RingPosition<Cfg> at) {
  return shared_address(smem.ring) + at.slot * kChunkBytes;
}

// S^T of one tile, left in flight. Group 0 is the rope chunk, which meets two parts of Q; groups 2 c + 1 and 2 c + 2
// are the halves of the c-th latent chunk loaded.
template <class Cfg>
ETAP_DEVICE void score_tile_e4m3(SharedStorage<Cfg>& smem, E4m3Pipeline& pipe, LaneOffsets const& offsets,
                                 RingPosition<Cfg> at, int group, float (&scores)[Cfg::kRowTile / 2]) {
  constexpr uint32_t kQueryChunk = Cfg::kRowTile * 128 / kDescriptorUnit, kStep = 32 / kDescriptorUnit;
  constexpr int kGroups = 2 * Cfg::kRingLatent + 1;
  uint32_t const query = descriptor_low(shared_address(smem.query));
  uint32_t keys = 0;
  auto load = [&](int g) {
    if (g % 2 == 1) at.advance();
    if (g == 0 || g % 2 == 1) smem.control.full[at.slot].wait(at.parity);
    if (g == 0) return load_rope_group(pipe.bytes, chunk_address(smem, at) + offsets.rope);
    if (g % 2 == 1) keys = chunk_address(smem, at) + offsets.keys;
    load_key_group(pipe.bytes, keys, (g - 1) % 2);
  };
  load(0);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if (g >= 2) cute::warpgroup_wait<1>();  // the group before last is done with its fragments
    widen_keys(pipe.bytes, pipe.a[g & 1]);
    if (g == 0) free_rope(smem, at.slot);
    if (g % 2 == 1) load(g + 1);
    cute::warpgroup_arrive();
#pragma unroll
    for (int part = 0; part < (g == 0 ? 2 : 1); ++part) {
      // the rope chunks are Q's last
      uint32_t const q = query + (g == 0 ? kLatentChunks + part : latent_chunk(g - 1, group)) * kQueryChunk;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma<__half, Cfg::kRowTile>(pipe.a[g & 1][j], descriptor(q + j * kStep), scores,
                             g + part + j == 0 ? ScaleOut::Zero : ScaleOut::One);
      }
    }
    cute::warpgroup_commit_batch();
    if (g % 2 == 0 && g + 1 < kGroups) load(g + 1);  // it may have to wait for its chunk
  }
}

// O^T += V^T P^T, left in flight; frees the latent chunks. `at`: the first, whose first block's bytes are there.
template <class Cfg>
ETAP_DEVICE void accumulate_tile_e4m3(SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st, E4m3Pipeline& pipe,
                                      LaneOffsets const& offsets, RingPosition<Cfg> at, uint32_t prob) {
  uint32_t const p_low = descriptor_low(prob);
  uint32_t values = chunk_address(smem, at) + offsets.values;
  auto load = [&](int c) {
    if (c % 2 == 0 && c > 0) {
      at.advance();
      values = chunk_address(smem, at) + offsets.values;
    }
    load_value_group(pipe.bytes, values, c % 2);
  };
#pragma unroll
  for (int c = 0; c < kLatentChunks; ++c) {
    Group& a = pipe.a[c & 1];
    if (c >= 2) cute::warpgroup_wait<1>();
    widen_values(pipe.bytes, a);
    if (c % 2 == 1) free_latent(smem, at.slot);
    if (c + 1 < kLatentChunks) load(c + 1);
    cute::warpgroup_arrive();
#pragma unroll
    for (int part = 0; part < (Cfg::kConcatP ? 1 : Cfg::kPParts); ++part) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t const of_keys = p_low + (part * Cfg::kRowTile * 128 + j * 32) / kDescriptorUnit;
        wgmma<__half, Cfg::kPvRows>(a[j], descriptor(of_keys), st.out[c], ScaleOut::One);
      }
    }
    cute::warpgroup_commit_batch();
  }
}

// One tile of a warpgroup that owns whole tiles. `buffer` alternates per tile.
template <class Cfg>
ETAP_DEVICE void consume_tile_e4m3(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                   E4m3Pipeline& pipe, LaneOffsets const& offsets, MaskBounds const& mask,
                                   RingPosition<Cfg> at, int tile, int buffer) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
  RingPosition<Cfg> const latent = at.ahead(1);
  uint32_t const values = chunk_address(smem, latent) + offsets.values;
  float scores[Cfg::kRowTile / 2];
  await_previous_pass(smem, at.ahead(Cfg::kForeignFirst), Cfg::kForeignChunks, st.lane);
  score_tile_e4m3(smem, pipe, offsets, at, st.group, scores);
  load_value_group(pipe.bytes, values, 0);
  cute::warpgroup_wait<0>();
#pragma unroll
  for (int i = 0; i < kStats; ++i) {
    float const scale = smem.control.row_scale[st.row_of(i)];
    scores[4 * (i / 2) + (i & 1)] *= scale;
    scores[4 * (i / 2) + 2 + (i & 1)] *= scale;
  }
  mask_tile(p, smem, st, mask, at, tile, scores, [&] {
    sync_group(st.group);
    load_value_group(pipe.bytes, values, 0);
  });
  uint32_t const prob = shared_address(smem.prob[2 * st.group + buffer]);
  write_own_probabilities<__half>(p, smem, st, prob, scores);
  accumulate_tile_e4m3(smem, st, pipe, offsets, latent, prob);
  cute::warpgroup_wait<0>();
}

// This warpgroup's tiles of a piece: every second one.
template <class Cfg>
ETAP_DEVICE void consume_tiles_e4m3(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                    PieceInfo const& piece, MaskBounds const& mask) {
  int const begin = piece.begin, tiles = piece.end - begin, chunk = piece.first_chunk;
  LaneOffsets const offsets(st.warp, st.lane);
  E4m3Pipeline pipe;
  ETAP_ROLLED
  for (int i = st.group; i < tiles; i += kConsumerGroups) {
    consume_tile_e4m3(p, smem, st, pipe, offsets, mask, RingPosition<Cfg>::at(chunk + i * Cfg::kRingTile),
                      begin + i, i / 2 % 2);
  }
  cute::warpgroup_wait<0>();
}

}  // namespace etap
