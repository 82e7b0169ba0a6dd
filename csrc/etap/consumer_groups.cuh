// The consumer warpgroups for an e4m3 cache whose latent part has a scale for each key and each 128 columns, a ring
// chunk: as in consumer_e4m3_wide.cuh, with the scales put where they cost no accuracy.
//
//   S^T   a chunk's products have accumulators of their own, which fp32 adds up, times the key's scale and the row's
//         factor; a row's factor holds all that is the same for its keys, and the rope part has another. Scores come
//         out in log2 units.
//   O^T   each chunk meets a version of P^T of its own, P x scale, rounded to fp16 as P itself would be.
//
// Which scales are good: any finite ones, 0 and negative ones too. Scores overflow only where one step of e4m3, 2^-9,
// times a row's largest element does. P x scale stays below 2^15: P is at most 2^8, and scales are divided by a power
// of two that brings the largest so far, of the CTA's keys in the group of columns, to below 2^7. O^T is
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
  for (int c = 0; c < Cfg::kOwnBlocks; ++c) {
    float const factor = factor_of(Cfg::own_block(0, c) / Cfg::kChunkBlocks + st.group);
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
  for (int g = 0; g < kScaleGroups; ++g) {
    factor[g] = __uint_as_float(uint32_t(max(127 - int(top[g] - before[g]), 0)) << 23);
  }
  multiply_groups(st, [&](int g) { return g == 0 ? factor[0] : g == 1 ? factor[1] : g == 2 ? factor[2] : factor[3]; });
}

// What a thread multiplies the probabilities of its two keys by, for each group of columns.
struct KeyFactors {
  float of[kScaleGroups][2];
  bool exceed;  // whether a scale exceeds its power

  // `valid`: keys of the tile that there are; scales of others may be anything.
  ETAP_DEVICE void load(float4 const* scales, uint4 const& of_groups, int key, int valid) {
    uint4 const q = of_groups;
    exceed = false;
    uint32_t const powers[kScaleGroups] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 s = make_uint4(0, 0, 0, 0);
      if (key + 8 * half < valid) s = reinterpret_cast<uint4 const*>(scales)[key + 8 * half];
      uint32_t const bits[kScaleGroups] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int g = 0; g < kScaleGroups; ++g) {
        exceed |= (bits[g] & 0x7fffffffu) >= (powers[g] + 1) << 23;
        of[g][half] = __uint_as_float(bits[g]) * dividing_factor(powers[g]);
      }
    }
  }
};

// P^T of this warp's keys to shared memory, in a version for each group of columns, times the keys' factors; otherwise
// as write_probabilities.
template <class Cfg>
ETAP_DEVICE bool write_versions(ConsumerState<Cfg> const& st, uint32_t prob, KeyFactors const& factors,
                                float const (&scores)[Cfg::kScoreRows / 2],
                                float (&tile_sum)[ConsumerState<Cfg>::kStats]) {
  constexpr int kStep = Cfg::kProbBlocks;
  bool exceeds = factors.exceed;
#pragma unroll
  for (int block = 0; block < Cfg::kScoreRows / 8; block += kStep) {
    float e[kStep][4];
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      int const j = block + k;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const x = scores[4 * j + i] - st.reference[2 * j + (i & 1)];
        exceeds |= x > kReferenceSlack;
        e[k][i] = exp2_approx(x);
      }
      tile_sum[2 * j] = e[k][0] + e[k][2];
      tile_sum[2 * j + 1] = e[k][1] + e[k][3];
    }
#pragma unroll
    for (int g = 0; g < kScaleGroups; ++g) {
      uint32_t packed[Cfg::kPParts][kStep][2];  // [part][block][key half]
#pragma unroll
      for (int k = 0; k < kStep; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float const factor = factors.of[g][half];
          split_pair<__half, Cfg>(e[k][2 * half] * factor, e[k][2 * half + 1] * factor, packed, k, half);
        }
      }
      store_probabilities<Cfg>(st, prob + g * Cfg::kProbBytes, block, packed);
    }
  }
  cutlass::arch::fence_view_async_shared();
  return exceeds;
}

// One tile. `at`: its rope chunk. `meanwhile` is called behind the tile's last sums, with V^T P^T under way.
template <class T, class Cfg, class Meanwhile>
ETAP_DEVICE void consume_tile_groups(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                     E4m3Pipeline& pipe, LaneOffsets const& offsets, MaskBounds const& mask,
                                     RingPosition<Cfg> at, ScalePosition scales_at, int tile,
                                     Meanwhile const& meanwhile) {
  ScaleOut const before = Cfg::kOverwrites && st.fresh ? ScaleOut::Zero : ScaleOut::One;
  int const end = (tile + 1) * kTileKeys, valid = mask.len - tile * kTileKeys;
  float4 const* const scales = smem.control.scales[scales_at.slot];
  uint4& powers = smem.control.power[st.group][st.warp];
  OwnValues<Cfg> values{smem, at.ahead(1 + st.group), offsets.values};
  float all[Cfg::kRowTile / 2], scores[Cfg::kScoreRows / 2];
  score_own_groups<T>(p, smem, st, pipe, offsets, at, scales_at, all, [&] {
    if (end > mask.len) {
      sync_group(st.group);
      clear_own_tail(smem, st, at, valid);
    }
    values.load(0);
  });
  trace(kScored, st.fresh && st.group + st.warp + st.lane == 0);
  bool const fresh = st.fresh;  // the first tile sets reference and powers; a later one rarely has to raise them
  KeyFactors factors;
  auto const load_factors = [&] { factors.load(scales, powers, st.warp * 16 + st.lane / 4, valid); };
  exchange_scores(smem, st, all, scores, [&] {
    if (fresh) raise_powers(powers, scales, valid, st);
    load_factors();
    values.widen(0);
    values.widen(1);
  });
  if (end > mask.len || (p.causal && end > mask.causal_gap + 1)) mask_scores(p, mask, st, tile, scores);
  uint32_t const prob = shared_address(smem.prob[0]) + st.first_row() * 128;
  write_raising(
      st, kBarrierConsumers, kConsumerThreads,
      [&] {
        if (!fresh) {
          raise_powers(powers, scales, valid, st);
          load_factors();
        }
        raise_reference_wide(p, smem, st, scores);
      },
      [&](float (&tile_sum)[ConsumerState<Cfg>::kStats]) {
        return write_versions(st, prob, factors, scores, tile_sum);
      });
  if (p.group_scale) smem.control.scales_empty[scales_at.slot].arrive();
  accumulate_own_values(smem, st, values, before, meanwhile);
}

// All tiles of a piece; last_one() is called while the last one's V^T P^T is under way.
template <class T, class Cfg, class LastOne>
ETAP_DEVICE void consume_tiles_groups(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                                      MaskBounds const& mask, PieceInfo const& piece, LastOne const& last_one) {
  int const begin = piece.begin, tiles = piece.end - begin, chunk = piece.first_chunk;
  E4m3Pipeline pipe;
  uint4& powers = smem.control.power[st.group][st.warp];
  if (st.lane == 0) powers = make_uint4(kLeastPower, kLeastPower, kLeastPower, kLeastPower);
  __syncwarp();
  ETAP_ROLLED
  for (int i = 0; i < tiles; ++i) {
    int lane = st.lane;
    if (Cfg::kRowTile == 32 && Cfg::kPParts == 2) keep(lane);  // else what follows from it is kept, spilled
    LaneOffsets const offsets(st.warp, lane);
    auto const at = RingPosition<Cfg>::at(chunk + i * Cfg::kRingTile);
    auto const scales_at = ScalePosition::at(first_tile(smem, piece) + i);
    consume_tile_groups<T>(p, smem, st, pipe, offsets, mask, at, scales_at, begin + i, [&] {
      if (i + 1 == tiles) last_one();
    });
  }
  multiply_groups(st, [&](int g) { return restoring_factor(reinterpret_cast<uint32_t const*>(&powers)[g]); });
}

}  // namespace etap
