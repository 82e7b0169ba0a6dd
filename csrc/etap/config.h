// Tile shapes and the shared-memory budget of the ETAP MLA decode kernel. Plain C++17: the host module and
// the CPU tests compile this very file.
#pragma once

#include <cstdint>

namespace etap {

constexpr int kLatentDim = 512;                     // ckv columns; also the output width
constexpr int kRopeDim = 64;                        // kpe columns
constexpr int kTileKeys = 64;                       // keys per KV tile: M of wgmma
constexpr int kChunkCols = 64;                      // columns per ring chunk: one 128-byte swizzle row
constexpr int kLatentChunks = kLatentDim / kChunkCols;  // also blocks of O^T: 64 latent columns each
constexpr int kTileChunks = kLatentChunks + 1;      // the rope chunk comes first
constexpr int kChunkBytes = kTileKeys * kChunkCols * 2;
constexpr int kConsumerGroups = 2;                  // consumer warpgroups
constexpr int kConsumerThreads = kConsumerGroups * 128;
constexpr int kThreads = kConsumerThreads + 128;    // and one producer warpgroup
constexpr int kMaxSharedBytes = 227 * 1024;         // what sm_90 lets one block opt in to
// Latent chunk that the i-th one loaded of a tile is. Tiles of warpgroup 1 begin with the upper half, so that each
// warpgroup finds in its first accumulators the half of O^T that it finishes.
#if defined(__CUDACC__)
__host__ __device__
#endif
constexpr int latent_chunk(int i, int group) { return i ^ (group * (kLatentChunks / 2)); }
constexpr int kMaxRing = 24;
constexpr int kMaxCtas = 256;                       // of one launch: more SMs than any Hopper GPU has

// A slot of the workspace: a partial O^T in fp32, then per row its reference maximum and sum, in whole lines.
constexpr int partial_bytes(int row_tile) { return row_tile * kLatentDim * 4; }
constexpr int stats_bytes(int row_tile) { return (row_tile * 8 + 127) / 128 * 128; }
constexpr int slot_bytes(int row_tile) { return partial_bytes(row_tile) + stats_bytes(row_tile); }

// Requests whose lengths the plan keeps: in registers (some a lane), or, of more, in shared memory.
constexpr int kOwnRequests = 4, kMostOwned = 32 * kOwnRequests;
constexpr int kept_requests(int row_tile) { return row_tile < 64 ? 1024 : 256; }
// Whether a launch may deal requests by rank (see schedule.h).
constexpr bool may_deal(int row_tile) { return row_tile < 64; }

// A launch that reads no more of the cache has its keys evicted from L2 first: they are read once, and take the place
// of one another rather than of what was written before, which would have to go to memory. Measured with 50 MB of L2:
// up to 170 MB gain 4 to 10%, 250 MB lose 1%, 1.2 GB 5%.
constexpr int64_t kEvictFirstBytes = 180 << 20;

// Elements of the cache: the query's 16-bit type, or e4m3, which the consumers widen to fp16 in registers. An e4m3
// cache has one scale for its latent and one for its rope part; or kGroups: a scale for each key and kScaleGroup latent
// columns; or kGroupsRope16: that, and a rope part of the query's type, without a scale.
enum class CacheFormat { kQueryType, kE4m3, kE4m3Groups, kE4m3GroupsRope16 };
constexpr int kScaleGroup = 128;                    // latent columns that share a scale: those of an e4m3 ring chunk
constexpr int kScaleGroups = kLatentDim / kScaleGroup;
constexpr int kScaleTiles = 6;                      // tiles of scales in shared memory: more than the ring holds

// RowTile: query rows (tokens x heads of the one KV head) on wgmma's N; more rows loop over row tiles. PParts: 16-bit
// parts that P is split in.
// Wide: both warpgroups work on every tile, on every second latent chunk each, from which they make part of S^T and
// their blocks of O^T: of 64 rows their registers hold no more, and of 16 and 32 a tile is done and a piece ends sooner
// (8% of 512 keys, 0.5% of a long launch, 2% with 32 rows, measured; with an e4m3 cache and 32 rows 5 to 20%). Else
// each owns whole tiles of keys, all of O^T for them, and softmax of one is hidden behind the other's wgmma: for 8
// rows, which are too few to split, for P in one part (an H20, whose tensor cores are the limit), and for an e4m3
// cache and 16 rows (12% of a long launch on an H200). With scales of groups, always wide, 16 rows or more.
template <int RowTile, int PParts, CacheFormat Format = CacheFormat::kQueryType>
struct TileConfig {
  static_assert(RowTile == 8 || RowTile == 16 || RowTile == 32 || RowTile == 64);
  static_assert(PParts == 1 || PParts == 2);
  static constexpr int kRowTile = RowTile;
  static constexpr int kPParts = PParts;
  static constexpr bool kE4m3 = Format != CacheFormat::kQueryType;
  static constexpr bool kRope16 = Format == CacheFormat::kE4m3GroupsRope16;
  static constexpr bool kGroups = Format == CacheFormat::kE4m3Groups || kRope16;
  static constexpr bool kWide =
      RowTile == 64 || kGroups || (kE4m3 ? RowTile == 32 : RowTile > 8 && PParts == 2);
  static_assert(!kGroups || RowTile > 8);
  static constexpr bool kFromRegisters = !kWide && !kE4m3 && PParts == 1;  // K and V: see consumer_registers.cuh
  static constexpr int kScoreRows = kWide ? RowTile / 2 : RowTile;  // rows that one warpgroup has the statistics of
  static constexpr int kOwnBlocks = kWide ? kLatentChunks / 2 : kLatentChunks;  // blocks of O^T that it accumulates
  // The ring: a tile is one rope chunk, then latent chunks of 128-byte rows. An e4m3 rope chunk has 64-byte rows and
  // fills half its slot.
  static constexpr int kElementBytes = kE4m3 ? 1 : 2;
  static constexpr int kRingCols = 128 / kElementBytes;             // columns of a latent chunk
  static constexpr int kRingLatent = kLatentDim / kRingCols;        // latent chunks of a tile
  static constexpr int kRingTile = kRingLatent + 1;                 // chunks of a tile
  static constexpr int kChunkBlocks = kRingCols / kChunkCols;       // blocks of O^T that a latent chunk is for
#if defined(__CUDACC__)
  __host__ __device__
#endif
  static constexpr int latent_column(int i, int group) {            // that the i-th latent chunk begins with
    return (i * kRingCols) ^ (kWide ? 0 : group * (kLatentDim / 2));  // see latent_chunk
  }
  // The block of O^T that a warpgroup finishes as its c-th of four. Wide: those of every second chunk, so that two
  // warpgroups at work free the ring's chunks in its order.
#if defined(__CUDACC__)
  __host__ __device__
#endif
  static constexpr int own_block(int group, int c) {
    return kWide ? (c / kChunkBlocks * 2 + group) * kChunkBlocks + c % kChunkBlocks : kLatentChunks / 2 * group + c;
  }
  static constexpr int kRopeRowBytes = kRopeDim * (kRope16 ? 2 : kElementBytes);
  static constexpr int kRopeBytes = kTileKeys * kRopeRowBytes;
  static constexpr int kTileBytes = kTileKeys * kLatentDim * kElementBytes + kRopeBytes;
  // Registers a thread of each role: the two consumer warpgroups and the producer share 3 x 168, what a launch gives.
  static constexpr int kConsumerRegisters = kE4m3 ? 208 : 216;
  static constexpr int kProducerRegisters = 3 * 168 - 2 * kConsumerRegisters;
  // Few outputs: both parts of P stand side by side on N (V is read once). Else they are accumulated in turn.
  static constexpr bool kConcatP = PParts == 2 && RowTile <= (kWide && !kE4m3 ? 32 : 16);
  static constexpr bool kOverwrites = kWide && RowTile < 64;  // the first tile overwrites O^T; else it is zeroed
  static constexpr int kPvRows = kConcatP ? 2 * RowTile : RowTile;     // N of O^T += V^T P^T
  static constexpr int kQueryChunks = kTileChunks + (kE4m3 && !kGroups);  // kE4m3: the rope part of Q in two fp16 parts
  static constexpr int kQueryBytes = kQueryChunks * RowTile * kChunkCols * 2;
  static constexpr int kProbBlocks = kScoreRows > 8 ? 2 : 1;  // blocks of 8 rows that are written together
  static constexpr int kProbBytes = PParts * RowTile * kTileKeys * 2;  // P^T of one tile
  static constexpr int kProbVersions = kGroups ? kScaleGroups : 1;  // of P^T: for each group of columns, P x scale
  static constexpr int kProbBuffers = kWide ? 1 : 2 * kConsumerGroups;
  // Wide: quads of S^T, in fp32, that a thread gives the other warpgroup.
  static constexpr int kGivenQuads = kWide ? RowTile / 16 : 0;
  static constexpr int kGivenBytes = kConsumerGroups * kGivenQuads * 128 * 16;
  // Ring chunks lent to the two warpgroups at the end of a piece, to exchange halves of O^T (fp32).
  static constexpr int kExchangeChunks = kWide ? 0 : RowTile / 4;
  // Arrivals that free a ring chunk: one per thread that reads it last. Wide: 256, since all eight warps read the rope
  // chunk; those that own a latent chunk arrive twice (the others' reads are behind a barrier by then).
  static constexpr int kOwnerArrivals = kWide ? 2 : 1;
  static constexpr int kScaleBytes = kGroups ? kScaleTiles * kTileKeys * kScaleGroups * 4 + 288 + 4 * RowTile : 0;
  static constexpr bool kUneven = PParts == 2 && RowTile < 64 && !kE4m3;  // the plan: memory is the limit
  static constexpr bool kDeals = may_deal(RowTile);
  static constexpr int kKeptRequests = kept_requests(RowTile);
  static constexpr int kDealBytes = kDeals ? 4 * kKeptRequests + 256 : 0;
  // Statistics, pieces, barriers, lengths.
  static constexpr int kControlBytes = 2048 + 96 * RowTile + kScaleBytes + 8 * kKeptRequests + kDealBytes;
  static constexpr int kFixedBytes =
      kQueryBytes + kProbBuffers * kProbVersions * kProbBytes + kGivenBytes + kControlBytes;
  static constexpr int kRingFit = (kMaxSharedBytes - kFixedBytes) / kChunkBytes;
  static constexpr int kRingMost = kRingFit < kMaxRing ? kRingFit : kMaxRing;
  // Whole pairs of tiles, if they are most of it: each warpgroup finds its tiles where its own were before, and need
  // not look after the other's (1.3% of 64K keys, measured: 18 chunks for 23). e4m3 chunks, which are free as soon as
  // they are read: more in flight at once come later (measured: 13 for 15 gain 2% of 16K keys, for 20 4%).
  static constexpr int kPaired = kRingMost / (2 * kRingTile) * (2 * kRingTile);
  static constexpr int kRing = kE4m3 ? 13 : 4 * kPaired >= 3 * kRingMost ? kPaired : kRingMost;
  static constexpr int kSharedBytes = kFixedBytes + kRing * kChunkBytes;
  static constexpr bool kTogether = kWide && kRing >= 2 * kRingTile;  // see await_slots
  // The chunks of a tile that lie where chunks of the other warpgroup's tiles did (see await_previous_pass).
  static constexpr int kRingShift = kRing % (2 * kRingTile);
  static constexpr int kForeignFirst = kRingShift > kRingTile ? kRingShift - kRingTile : 0;
  static constexpr int kForeignChunks = kRingShift > kRingTile ? 2 * kRingTile - kRingShift : kRingShift;
  static_assert(kRing >= kRingTile + 1 && kRing >= kExchangeChunks && kRing <= kRingFit);
};

}  // namespace etap
