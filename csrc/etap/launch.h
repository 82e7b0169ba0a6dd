// Host side of a launch: what the operator and the upstream adapters call. Compiled kernels live in csrc/instances/.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "config.h"
#include "params.h"

namespace etap {

enum class Dtype { kBf16, kFp16 };

struct LaunchConfig {
  Dtype dtype;   // of the query, and of the cache unless that is e4m3
  CacheFormat cache = CacheFormat::kQueryType;
  int row_tile;  // 8 but with scales of groups, 16, 32, or 64 but for an e4m3 cache
  int p_parts;   // 16-bit parts of P: 1, 2, or 0 for the GPU's default
  int num_ctas;  // at most one per SM
};

// The smallest row tile that holds `rows`, or the largest there is.
constexpr int row_tile_for(int64_t rows, CacheFormat cache) {
  bool const groups = cache == CacheFormat::kE4m3Groups || cache == CacheFormat::kE4m3GroupsRope16;
  return rows <= 8 && !groups ? 8 : rows <= 16 ? 16 : rows <= 32 || cache != CacheFormat::kQueryType ? 32 : 64;
}

// Keys per TMA box for a cache of these elements, or 0 if it must be gathered.
int tma_box_rows(MlaDecodeParams const& params, int element_bytes);

// 2, but 1 where the tensor cores are the limit, on an H20 (the Hopper GPU with 78 SMs), and for an e4m3 cache, whose P
// is float16.
constexpr int default_p_parts(CacheFormat cache, int sms) {
  return sms == 78 || cache != CacheFormat::kQueryType ? 1 : 2;
}

// The workspace (workspace.cuh): a header of zeros, then words of 0xff bytes, before the first launch. After that it
// serves any sequence of launches with as many CTAs and the same row tile; no two may use it at once.
constexpr size_t workspace_bytes(int num_ctas, int row_tile) {  // two buffers of two slots a CTA
  return kWorkspaceHeaderBytes + 2 * 2 * size_t(num_ctas) * slot_bytes(row_tile);
}

// Enqueues the kernel on the stream, of the current device; nothing else. Fills in what follows from the rest of the
// parameters: divisors, box_rows, gather_16b.
cudaError_t launch_mla_decode(MlaDecodeParams params, LaunchConfig const& config, cudaStream_t stream);

}  // namespace etap
