// Tile shapes and the shared-memory budget of the ETAP MLA decode kernel. Plain C++17: the host module and
// the CPU tests compile this very file.
#pragma once

namespace etap {

constexpr int kLatentDim = 512;                     // ckv columns; also the output width
constexpr int kRopeDim = 64;                        // kpe columns
constexpr int kTileKeys = 64;                       // keys per KV tile: M of wgmma
constexpr int kChunkCols = 64;                      // columns per ring chunk: one 128-byte swizzle row
constexpr int kLatentChunks = kLatentDim / kChunkCols;
constexpr int kTileChunks = kLatentChunks + 1;      // the rope chunk comes first
constexpr int kChunkBytes = kTileKeys * kChunkCols * 2;
constexpr int kConsumerGroups = 2;                  // consumer warpgroups
constexpr int kConsumerThreads = kConsumerGroups * 128;
constexpr int kThreads = kConsumerThreads + 128;    // and one producer warpgroup
constexpr int kMaxSharedBytes = 227 * 1024;         // what sm_90 lets one block opt in to
constexpr int kMaxRing = 24;

// RowTile: query rows (tokens x heads of the one KV head) on wgmma's N. PParts: 16-bit parts that P is split in.
template <int RowTile, int PParts>
struct TileConfig {
  static_assert(RowTile == 8 || RowTile == 16 || RowTile == 32 || RowTile == 64);
  static_assert(PParts == 1 || PParts == 2);
  static constexpr int kRowTile = RowTile;
  static constexpr int kPParts = PParts;
  // 64 rows: O^T does not fit one warpgroup's registers, so each warpgroup scores half the rows of every tile
  // and accumulates half of O^T's dv. Up to 32 rows each warpgroup owns whole alternate tiles.
  static constexpr bool kSplitDv = RowTile == 64;
  static constexpr int kScoreRows = kSplitDv ? RowTile / 2 : RowTile;             // N of S^T = K Q^T
  // Few rows: both parts of P stand side by side on N (V is read once). Else they are accumulated in turn.
  static constexpr bool kConcatP = PParts == 2 && RowTile <= 16;
  static constexpr int kPvRows = kConcatP ? 2 * RowTile : RowTile;                // N of O^T += V^T P^T
  static constexpr int kOutChunks = kSplitDv ? kLatentChunks / 2 : kLatentChunks; // O^T chunks of one warpgroup
  static constexpr int kQueryBytes = kTileChunks * RowTile * kChunkCols * 2;
  static constexpr int kProbBytes = PParts * RowTile * kTileKeys * 2;             // P^T of one tile
  static constexpr int kProbBuffers = kSplitDv ? 2 : 2 * kConsumerGroups;
  // Ring chunks lent to the two warpgroups at the end of a piece, to exchange halves of O^T (fp32), or (64 rows)
  // to stage the output.
  static constexpr int kExchangeChunks = kSplitDv ? 8 : RowTile / 4;
  static constexpr int kControlBytes = 2048 + 96 * RowTile;                       // statistics, plan, barriers
  static constexpr int kRingFit = (kMaxSharedBytes - kQueryBytes - kProbBuffers * kProbBytes - kControlBytes) / kChunkBytes;
  static constexpr int kRing = kRingFit < kMaxRing ? kRingFit : kMaxRing;
  static_assert(kRing >= kTileChunks + 1 && kRing >= kExchangeChunks);
};

}  // namespace etap
