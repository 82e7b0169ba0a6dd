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

#include "score_groups.cuh"

namespace etap {

// What the scales of a group of columns are divided by, as P x scale goes to fp16: 2^(power - 133), where the power is
// the largest biased exponent of them so far, and at least kLeastPower, so that all factors are normal.
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
  uint32_t p_low = descriptor_low(prob);
  keep(p_low);  // else all descriptors are worked out long before, and spilled
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

// The i-th tile of a piece. What follows from the lane and from the piece is worked out twice, before and behind S^T:
// kept, it would take registers.
template <class T, class Cfg>
ETAP_DEVICE void consume_tile_groups(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                     E4m3Pipeline& pipe, PieceInfo const& piece, int i) {
  constexpr int kStats = ConsumerState<Cfg>::kStats;
  auto const position = [&] { return RingPosition<Cfg>::at(piece.first_chunk + i * Cfg::kRingTile); };
  auto const scale_position = [&] { return ScalePosition::at(first_tile(smem, piece) + i); };
  auto const lane_offsets = [&] {
    if (Cfg::kParksStatistics) keep(st.lane);
    return LaneOffsets(st.warp, st.lane);
  };
  uint8_t* const prob_bytes = smem.prob[Cfg::kProbTurns * st.group + i / 2 % Cfg::kProbTurns];
  await_previous_pass(smem, position().ahead(Cfg::kForeignFirst), Cfg::kForeignChunks, st.lane);
  float scores[Cfg::kRowTile / 2];
  if constexpr (Cfg::kParksStatistics) ParkedStatistics<Cfg>{prob_bytes}.park(st);
  score_tile_groups<T>(p, smem, st, pipe, lane_offsets(), position(), scale_position(), scores);
  if constexpr (Cfg::kParksStatistics) ParkedStatistics<Cfg>{prob_bytes}.fetch(st);
  LaneOffsets const offsets = lane_offsets();
  RingPosition<Cfg> const at = position(), latent = at.ahead(1);
  ScalePosition const scales_at = scale_position();
  int const tile = piece.begin + i, valid = piece.len - tile * kTileKeys;
  MaskBounds const mask{piece.len, piece.row_tile * Cfg::kRowTile, piece.len - piece.q_len};
  if (valid < kTileKeys || (p.causal && valid < kTileKeys + piece.q_len - 1)) {
    mask_scores(p, mask, st, tile, scores);
    if (valid < kTileKeys) {
      clear_tail(smem, at, valid, st);
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
  for (int k = 0; k < kStats; ++k) st.sum[k] += tile_sum[k];
  if constexpr (Cfg::kLoadsAhead) {
    accumulate_tile_e4m3(smem, st, pipe, offsets, latent, prob);
  } else {
    accumulate_tile_narrow(smem, st, pipe, offsets, latent, prob);
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
