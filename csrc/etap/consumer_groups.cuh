// The consumer warpgroups for an e4m3 cache whose latent part has a scale for each key and each 128 columns, a ring
// chunk: as in consumer_e4m3.cuh, with the scales put where they cost no accuracy.
//
//   S^T   a chunk's products have accumulators of their own, which fp32 adds up, times the key's scale and the row's
//         factor; a row's factor holds all that is the same for its keys, and the rope part has another. Scores come
//         out in log2 units.
//   O^T   each chunk meets a version of P^T of its own, P x scale, rounded to fp16 as P itself would be.
//
// Which scales are good: any finite ones, 0 and negative ones too. Scores overflow only where one step of e4m3, 2^-9,
// times a row's largest element does. P x scale stays below 2^15: P is at most 2^8, and scales are divided by a power
// of two that brings the largest so far, of the warpgroup's keys in the group of columns, to below 2^7. O^T is
// multiplied by it at the end of the piece: in fp32, so that below 2^79 nothing overflows that P could sum up to.
// A scale 2^20 times smaller than the largest still has all 11 bits where P is 1 or more.
#pragma once

#include "consumer_e4m3.cuh"

namespace etap {

// Loads the piece's query rows: the latent part as fp16, each row times a power of two; the rope part likewise, with a
// power of its own, or as it is where the cache's is of the same type.
template <class T, class Cfg>
ETAP_DEVICE void load_query_groups(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, PieceInfo const& piece,
                                   int thread) {
  using Vectors = QueryVectors<Cfg>;
  int const r = thread / Vectors::kLanes, lane = thread % Vectors::kLanes;
  Vectors const q(p, piece, thread);
  float const ckv_scale = latent_scale(p, piece.request);  // 1 beside scales of groups
  QueryScale const latent(largest_of_row<Cfg>(q.template latent_exponent<T>()));
  if (thread == 0) smem.control.value_scale[piece.table] = ckv_scale;
  if (lane == 0) smem.control.row_scale[r] = finite_factor(p.scale_log2 * ckv_scale * latent.down);
#pragma unroll
  for (int k = 0; k < Vectors::kLatent; ++k) {
    int const v = lane + k * Vectors::kLanes;
    store_query_scaled<T>(smem.query[v / 8], r, v % 8, q.latent[k], latent.up);
  }
  if constexpr (Cfg::kRope16) {
    if (lane < 8) *reinterpret_cast<uint4*>(smem.query[kLatentChunks] + swizzled(r, lane)) = q.rope;
  } else {
    QueryScale const rope(largest_of_row<Cfg>(q.template rope_exponent<T>()));
    if (lane == 0) {
      smem.control.rope_scale[r] = finite_factor(p.scale_log2 * rope_scale(p, piece.request) * rope.down);
    }
    if (lane < 8) store_query_scaled<T>(smem.query[kLatentChunks], r, lane, q.rope, rope.up);
  }
  if (!p.group_scale) {  // nobody else writes them
    ETAP_ROLLED
    for (int i = thread; i < kScaleTiles * kTileKeys; i += kConsumerThreads) {
      smem.control.scales[i / kTileKeys][i % kTileKeys] = make_float4(1, 1, 1, 1);
    }
  }
  cutlass::arch::fence_view_async_shared();
}

// The group of columns that the c-th latent chunk of a tile is: see latent_chunk.
ETAP_DEVICE int scale_group(int c, int group) { return c ^ (group * (kScaleGroups / 2)); }

// Keeps a use of wgmma's results behind the wait for them.
template <int N>
ETAP_DEVICE void fence_results(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(d[i]);
}

// Adds a chunk's products to the scores. `low`, `high`: its scales for the thread's two keys.
template <class Cfg>
ETAP_DEVICE void add_products(SharedStorage<Cfg> const& smem, ConsumerState<Cfg> const& st, float low, float high,
                              float (&products)[Cfg::kRowTile / 2], float (&scores)[Cfg::kRowTile / 2]) {
  fence_results(products);
#pragma unroll
  for (int i = 0; i < ConsumerState<Cfg>::kStats; ++i) {
    float const factor = smem.control.row_scale[st.row_of(i)];
    int const at = 4 * (i / 2) + (i & 1);
    scores[at] = fmaf(products[at], low * factor, scores[at]);
    scores[at + 2] = fmaf(products[at + 2], high * factor, scores[at + 2]);
  }
}

// The rope chunk's products, left in flight.
template <class T, class Cfg>
ETAP_DEVICE void score_rope(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, E4m3Pipeline& pipe,
                            LaneOffsets const& offsets, RingPosition<Cfg> at, int lane,
                            float (&scores)[Cfg::kRowTile / 2]) {
  constexpr uint32_t kStep = 32 / kDescriptorUnit;
  uint32_t const query = descriptor_low(shared_address(smem.query[kLatentChunks])), keys = chunk_address(smem, at);
  smem.control.full[at.slot].wait(at.parity);
  if constexpr (Cfg::kRope16) {
    if (p.box_rows == 0) cutlass::arch::fence_view_async_shared();  // cp.async writes through the generic proxy
    cute::warpgroup_arrive();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<T, Cfg::kRowTile, Major::K>(descriptor(descriptor_low(keys) + j * kStep), descriptor(query + j * kStep),
                                        scores, j == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
  } else {
    load_rope_group(pipe.bytes, keys + offsets.rope);
    widen_keys(pipe.bytes, pipe.a[0]);
    release_chunk(smem, at, lane);
    cute::warpgroup_arrive();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma<Cfg::kRowTile>(pipe.a[0][j], descriptor(query + j * kStep), scores,
                           j == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
  }
  cute::warpgroup_commit_batch();
}

// S^T of one tile, in log2 units. With kLoadsAhead, the bytes of the first block of V^T are there at the end.
template <class T, class Cfg>
ETAP_DEVICE void score_tile_groups(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg> const& st,
                                   E4m3Pipeline& pipe, LaneOffsets const& offsets, RingPosition<Cfg> at,
                                   ScalePosition scales_at, float (&scores)[Cfg::kRowTile / 2]) {
  constexpr uint32_t kQueryChunk = Cfg::kRowTile * 128 / kDescriptorUnit, kStep = 32 / kDescriptorUnit;
  constexpr int kSteps = Cfg::kKeySteps, kParts = Cfg::kRingCols / (16 * kSteps);  // of a chunk
  constexpr int kSets = Cfg::kProductSets, kAll = Cfg::kRingLatent * kParts;
  uint32_t const query = descriptor_low(shared_address(smem.query));
  uint32_t const values = chunk_address(smem, at.ahead(1)) + offsets.values;
  RingPosition<Cfg> const rope = at;
  float const* const scales =
      reinterpret_cast<float const*>(&smem.control.scales[scales_at.slot][st.warp * 16 + st.lane / 4]);
  float products[kSets][Cfg::kRowTile / 2];  // of chunks in turn
  float low = 0, high = 0;                   // scales of the chunk that is added next
  uint32_t keys = 0;
  auto load = [&](int g) {  // bytes of the g-th group of fragments
    if (g % kParts == 0) {
      at.advance();
      smem.control.full[at.slot].wait(at.parity);
      keys = chunk_address(smem, at) + offsets.keys;
    }
#pragma unroll
    for (int j = 0; j < kSteps; j += 2) load_matrices(pipe.bytes, 2 * j, keys ^ ((g % kParts * kSteps + j) * 16));
  };
  auto load_scales = [&](int c) {
    int const i = scale_group(c, st.group);
    low = scales[i];
    high = scales[8 * kScaleGroups + i];
  };
  score_rope<T>(p, smem, pipe, offsets, at, st.lane, scores);
  if (p.group_scale) smem.control.scales_full[scales_at.slot].wait(scales_at.parity);
  if (Cfg::kLoadsAhead) load(0);
#pragma unroll
  for (int g = 0; g < kAll; ++g) {
    int const c = g / kParts, part = g % kParts;
    Group& a = pipe.a[(g + 1) & 1];  // the rope chunk had 0
    bool const adds = c > 0 && part == kSets - 1;  // the chunk before
    if (adds) load_scales(c - 1);
    if (adds && kSets == 1) {  // before there are fragments, which take registers
      cute::warpgroup_wait<0>();
      add_products(smem, st, low, high, products[0], scores);
    }
    if (!Cfg::kLoadsAhead) load(g);
    if (g > 0) cute::warpgroup_wait<1>();  // the group before last is done with its fragments
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      widen(pipe.bytes[2 * j], a[j][0], a[j][2]);
      widen(pipe.bytes[2 * j + 1], a[j][1], a[j][3]);
    }
    if (Cfg::kLoadsAhead && part + 1 < kParts) load(g + 1);
    if (g == 1) {  // the rope chunk is done with
      if (Cfg::kRope16) release_chunk(smem, rope, st.lane);
      fence_results(scores);
#pragma unroll
      for (int i = 0; i < ConsumerState<Cfg>::kStats; ++i) {
        float factor = p.scale_log2;
        if constexpr (!Cfg::kRope16) factor = smem.control.rope_scale[st.row_of(i)];
        scores[4 * (i / 2) + (i & 1)] *= factor;
        scores[4 * (i / 2) + 2 + (i & 1)] *= factor;
      }
    }
    if (adds && kSets == 2) add_products(smem, st, low, high, products[(c - 1) % kSets], scores);
    cute::warpgroup_arrive();
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      int const step = part * kSteps + j;
      uint32_t const q = query + latent_chunk(2 * c + step / 4, st.group) * kQueryChunk + step % 4 * kStep;
      wgmma<Cfg::kRowTile>(a[j], descriptor(q), products[c % kSets], step == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
    cute::warpgroup_commit_batch();
    if (Cfg::kLoadsAhead && part + 1 == kParts && g + 1 < kAll) load(g + 1);  // it may have to wait for its chunk
  }
  load_scales(Cfg::kRingLatent - 1);
  if (Cfg::kLoadsAhead) load_value_group(pipe.bytes, values, 0);
  cute::warpgroup_wait<0>();
  add_products(smem, st, low, high, products[(Cfg::kRingLatent - 1) % kSets], scores);
}

// What the scales of a group of columns are divided by, as P x scale goes to fp16: 2^(power - 133), where the power is the
// largest biased exponent of them so far, and at least kLeastPower, so that all factors are normal.
constexpr uint32_t kLeastPower = 7;
ETAP_DEVICE float dividing_factor(uint32_t power) { return __uint_as_float((260 - power) << 23); }
ETAP_DEVICE float restoring_factor(uint32_t power) { return __uint_as_float((power - 6) << 23); }

// O^T times a factor for each group of columns.
template <class Cfg, class F>
ETAP_DEVICE void multiply_groups(ConsumerState<Cfg>& st, F&& factor_of) {
#pragma unroll
  for (int c = 0; c < kLatentChunks; ++c) {
    float const factor = factor_of(scale_group(c / 2, st.group));
#pragma unroll
    for (int i = 0; i < Cfg::kPvRows / 2; ++i) st.out[c][i] *= factor;
  }
}

// Raises this warp's copy of the powers to the tile's scales, and rescales what was accumulated under lower ones. Every
// warp finds the same. `valid`: keys of the tile that there are.
template <class Cfg>
ETAP_DEVICE void raise_powers(uint4& powers, float4 const* scales, int valid, ConsumerState<Cfg>& st) {
  uint32_t top[kScaleGroups] = {0, 0, 0, 0};  // as bits without the sign, which order as the magnitudes do
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int const key = st.lane + 32 * i;
    uint4 const s = reinterpret_cast<uint4 const*>(scales)[key];
    uint32_t const of[kScaleGroups] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int g = 0; g < kScaleGroups; ++g) top[g] = max(top[g], key < valid ? of[g] & 0x7fffffffu : 0);
  }
  uint4 const old = powers;
  uint32_t const before[kScaleGroups] = {old.x, old.y, old.z, old.w};
  bool raised = false;
#pragma unroll
  for (int g = 0; g < kScaleGroups; ++g) {
    top[g] = max(before[g], __reduce_max_sync(~0u, top[g]) >> 23);
    raised |= top[g] != before[g];
  }
  if (!raised) return;
  __syncwarp();
  if (st.lane == 0) powers = make_uint4(top[0], top[1], top[2], top[3]);
  __syncwarp();
  if (st.fresh) return;
  float factor[kScaleGroups];
#pragma unroll
  for (int g = 0; g < kScaleGroups; ++g) factor[g] = __uint_as_float(uint32_t(max(127 - int(top[g] - before[g]), 0)) << 23);
  multiply_groups(st, [&](int g) { return g == 0 ? factor[0] : g == 1 ? factor[1] : g == 2 ? factor[2] : factor[3]; });
}

// P^T of this warp's keys to shared memory, in a version for each chunk of the tile, times the keys' scales; otherwise
// as write_probabilities. `valid`: keys of the tile that there are; scales of others may be anything.
template <class Cfg>
ETAP_DEVICE bool write_versions(ConsumerState<Cfg> const& st, uint32_t prob, float4 const* scales, int valid,
                                uint32_t const* powers,
                                float const (&scores)[Cfg::kRowTile / 2],
                                float (&tile_sum)[ConsumerState<Cfg>::kStats]) {
  constexpr int kBlocks = Cfg::kRowTile / 8, kPair = kBlocks > 1 ? 2 : 1;  // blocks of 8 rows; those of one store
  uint32_t const half = (st.lane >> 3) & 1, upper = st.lane >> 4;
  int const key = st.warp * 16 + st.lane / 4;
  bool exceeds = false;
#pragma unroll
  for (int j0 = 0; j0 < kBlocks; j0 += kPair) {
    float e[kPair][4];
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const x = scores[4 * (j0 + j) + i] - st.reference[2 * (j0 + j) + (i & 1)];
        exceeds |= x > kReferenceSlack;
        e[j][i] = exp2_approx(x);
      }
      tile_sum[2 * (j0 + j)] = e[j][0] + e[j][2];
      tile_sum[2 * (j0 + j) + 1] = e[j][1] + e[j][3];
    }
#pragma unroll
    for (int v = 0; v < kScaleGroups; ++v) {
      int const i = scale_group(v, st.group);
      float const down = dividing_factor(powers[i]);
      float scale[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        scale[k] = key + 8 * k < valid ? reinterpret_cast<float const*>(scales + key + 8 * k)[i] * down : 0.0f;
      }
      uint32_t packed[Cfg::kPParts][kPair][2];  // [part][block][key half]
#pragma unroll
      for (int j = 0; j < kPair; ++j) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float const first = e[j][2 * k] * scale[k], second = e[j][2 * k + 1] * scale[k];
          packed[0][j][k] = pack_pair(first, second, __half{});
          if constexpr (Cfg::kPParts == 2) {
            float2 const rounded = unpack_pair(packed[0][j][k], __half{});
            packed[1][j][k] = pack_pair(first - rounded.x, second - rounded.y, __half{});
          }
        }
      }
      uint32_t const to = prob + v * Cfg::kProbBytes;
#pragma unroll
      for (int part = 0; part < Cfg::kPParts; ++part) {
        uint32_t const row = part * Cfg::kRowTile + (j0 + (kPair > 1 ? upper : 0)) * 8 + (st.lane & 7);
        uint32_t const address = to + swizzled(row, 2 * st.warp + half);
        if constexpr (kPair == 1) {
          store_matrices(address, packed[part][0][0], packed[part][0][1]);
        } else {
          store_matrices(address, packed[part][0][0], packed[part][0][1], packed[part][1][0], packed[part][1][1]);
        }
      }
    }
  }
  cutlass::arch::fence_view_async_shared();
  return exceeds;
}

// accumulate_tile_e4m3 where registers are short: fragments for two steps of k16 at a time, nothing loaded ahead.
template <class Cfg>
ETAP_DEVICE void accumulate_tile_narrow(SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st, E4m3Pipeline& pipe,
                                        LaneOffsets const& offsets, RingPosition<Cfg> at, uint32_t prob) {
  uint32_t const p_low = descriptor_low(prob);
  uint32_t values = chunk_address(smem, at) + offsets.values;
#pragma unroll
  for (int g = 0; g < 2 * kLatentChunks; ++g) {
    int const c = g / 2, half = g % 2;  // half of the keys
    Group& a = pipe.a[g & 1];
    if (g % 4 == 0 && g > 0) {
      at.advance();
      values = chunk_address(smem, at) + offsets.values;
    }
    load_matrices_transposed(pipe.bytes, 0, (values ^ (c % 2 * 64)) + half * 32 * 128);
    if (g >= 2) cute::warpgroup_wait<1>();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      widen(__byte_perm(pipe.bytes[i], 0, 0x3120), a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]);
    }
    if (g % 4 == 3) release_chunk(smem, at, st.lane);
    cute::warpgroup_arrive();
#pragma unroll
    for (int part = 0; part < (Cfg::kConcatP ? 1 : Cfg::kPParts); ++part) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t const from = c / 2 * Cfg::kProbBytes + part * Cfg::kRowTile * 128 + (2 * half + j) * 32;
        wgmma<Cfg::kPvRows>(a[j], descriptor(p_low + from / kDescriptorUnit), st.out[c], ScaleOut::One);
      }
    }
    cute::warpgroup_commit_batch();
  }
}

// With 32 rows registers are short while S^T is computed: a thread's statistics wait where P^T will be, in units of 16
// bytes that its own warp writes. Unit k is half of the columns of version k / 2, in row `lane`.
template <class Cfg>
struct ParkedStatistics {
  static constexpr int kUnits = ConsumerState<Cfg>::kStats / 4;
  uint8_t* prob;

  ETAP_DEVICE float4& unit(ConsumerState<Cfg> const& st, int k) const {
    static_assert(2 * kUnits <= 2 * kScaleGroups && Cfg::kProbTurns == 1);
    return *reinterpret_cast<float4*>(prob + k / 2 * Cfg::kProbBytes + swizzled(st.lane, 2 * st.warp + k % 2));
  }
  ETAP_DEVICE void park(ConsumerState<Cfg> const& st) const {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      float const *a = st.sum + 4 * k, *b = st.reference + 4 * k;
      unit(st, k) = make_float4(a[0], a[1], a[2], a[3]);
      unit(st, kUnits + k) = make_float4(b[0], b[1], b[2], b[3]);
    }
  }
  ETAP_DEVICE void fetch(ConsumerState<Cfg>& st) const {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      float4 const a = unit(st, k), b = unit(st, kUnits + k);
      float *sum = st.sum + 4 * k, *reference = st.reference + 4 * k;
      sum[0] = a.x, sum[1] = a.y, sum[2] = a.z, sum[3] = a.w;
      reference[0] = b.x, reference[1] = b.y, reference[2] = b.z, reference[3] = b.w;
    }
    __syncwarp();  // P^T may be written
  }
};

// The i-th tile of a piece.
template <class T, class Cfg>
ETAP_DEVICE void consume_tile_groups(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                     E4m3Pipeline& pipe, PieceInfo const& piece, int i) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
  auto const at = RingPosition<Cfg>::at(piece.first_chunk + i * Cfg::kRingTile), latent = at.ahead(1);
  auto const scales_at = ScalePosition::at(piece.first_tile + i);
  uint8_t* const prob_bytes = smem.prob[Cfg::kProbTurns * st.group + i / 2 % Cfg::kProbTurns];
  // Else what follows from it is kept, and other things spilled.
  if (Cfg::kParksStatistics) asm volatile("" : "+r"(st.lane));
  LaneOffsets const offsets(st.warp, st.lane);
  float scores[Cfg::kRowTile / 2];
  if constexpr (Cfg::kParksStatistics) ParkedStatistics<Cfg>{prob_bytes}.park(st);
  score_tile_groups<T>(p, smem, st, pipe, offsets, at, scales_at, scores);
  if constexpr (Cfg::kParksStatistics) ParkedStatistics<Cfg>{prob_bytes}.fetch(st);
  if (Cfg::kParksStatistics) asm volatile("" : "+r"(st.lane));
  int const tile = piece.begin + i, valid = piece.len - tile * kTileKeys;
  MaskBounds const mask{piece.len, piece.row_tile * Cfg::kRowTile, piece.len - piece.q_len};
  if (valid < kTileKeys || (p.causal && valid < kTileKeys + piece.q_len - 1)) {
    mask_scores(p, mask, st, tile, scores);
    if (valid < kTileKeys) {
      clear_tail(smem, at, valid, st.warp * 32 + st.lane, 128);
      sync_group(st.group);
      if (Cfg::kLoadsAhead) load_value_group(pipe.bytes, chunk_address(smem, latent) + offsets.values, 0);
    }
  }
  float4 const* const scales = smem.control.scales[scales_at.slot];
  uint4& powers = smem.control.power[st.group][st.warp];
  raise_powers(powers, scales, valid, st);
  uint32_t const prob = shared_address(prob_bytes);
  float tile_sum[kStats];
  bool raise = st.fresh;  // the first tile sets the reference; a later one rarely has to
  ETAP_ROLLED
  do {
    if (raise) raise_reference(p, smem, st, scores);
    bool const exceeds = write_versions(st, prob, scales, valid, reinterpret_cast<uint32_t const*>(&powers), scores, tile_sum);
    raise = sync_or(kBarrierGroup0 + st.group, 128, exceeds);
  } while (raise);
  if (p.group_scale && st.lane == 0) smem.control.scales_empty[scales_at.slot].arrive();
#pragma unroll
  for (int i = 0; i < kStats; ++i) st.sum[i] += tile_sum[i];
  if constexpr (Cfg::kKeySteps == 2) {
    accumulate_tile_narrow(smem, st, pipe, offsets, latent, prob);
  } else {
    accumulate_tile_e4m3(smem, st, pipe, offsets, latent, prob);
  }
  cute::warpgroup_wait<0>();
  if (Cfg::kProbTurns == 1) sync_group(st.group);  // P^T may be written again
}

// This warpgroup's tiles of a piece: every second one. The piece is read again for each: kept, it would take registers.
template <class T, class Cfg>
ETAP_DEVICE void consume_tiles_groups(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                      PieceInfo const& piece) {
  E4m3Pipeline pipe;
  uint4& powers = smem.control.power[st.group][st.warp];
  if (st.lane == 0) powers = make_uint4(kLeastPower, kLeastPower, kLeastPower, kLeastPower);
  __syncwarp();
  ETAP_ROLLED
  for (int i = st.group; i < piece.end - piece.begin; i += kConsumerGroups) {
    consume_tile_groups<T>(p, smem, st, pipe, piece, i);
  }
  cute::warpgroup_wait<0>();
  multiply_groups(st, [&](int g) { return restoring_factor(reinterpret_cast<uint32_t const*>(&powers)[g]); });
}

}  // namespace etap
