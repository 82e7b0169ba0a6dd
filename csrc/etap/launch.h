// Host side of a launch: what the operator and the upstream adapters call. Compiled kernels live in csrc/instances/.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "params.h"

namespace etap {

enum class Dtype { kBf16, kFp16 };

struct LaunchConfig {
  Dtype dtype;
  int row_tile;  // 8, 16, 32 or 64
  int p_parts;   // 1 or 2
  int num_ctas;  // at most one per SM
};

// Rows of the smallest row tile that holds `rows`, or 64.
constexpr int row_tile_for(int rows) { return rows <= 8 ? 8 : rows <= 16 ? 16 : 32; }

// Keys per TMA box for this cache, or 0 if it must be gathered.
int tma_box_rows(MlaDecodeParams const& params);

// A launch needs a workspace in which the first kMergeCountBytes are 0 and the rest is 0xff bytes. The kernel leaves
// it that way, whatever the configuration, so one initialisation serves any sequence of launches.
constexpr int kMaxCtas = 2048;
constexpr size_t kMergeCountBytes = 2 * kMaxCtas * sizeof(int);
size_t workspace_bytes(LaunchConfig const& config);
// Points params at such a workspace.
void set_workspace(MlaDecodeParams& params, LaunchConfig const& config, void* base);

// Enqueues the kernel on the stream; nothing else. The workspace must not be shared with a launch that may overlap.
cudaError_t launch_mla_decode(MlaDecodeParams params, LaunchConfig const& config, cudaStream_t stream);

}  // namespace etap
