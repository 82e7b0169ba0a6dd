// Host side of a launch: what the operator and the upstream adapters call. Compiled kernels live in csrc/instances/.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "params.h"

namespace etap {

enum class Dtype { kBf16, kFp16 };

struct LaunchConfig {
  Dtype dtype;
  int row_tile;  // 8, 16 or 32
  int p_parts;   // 16-bit parts of P: 1, 2, or 0 for the GPU's default
  int num_ctas;  // at most one per SM
};

// The smallest row tile that holds `rows`, or the largest there is.
constexpr int row_tile_for(int64_t rows) { return rows <= 8 ? 8 : rows <= 16 ? 16 : 32; }

// Keys per TMA box for this cache, or 0 if it must be gathered.
int tma_box_rows(MlaDecodeParams const& params);

// 2, but 1 on an H20 (the Hopper GPU with 78 SMs), where the tensor cores are the limit.
constexpr int default_p_parts(int sms) { return sms == 78 ? 1 : 2; }

constexpr int kMaxCtas = 256;

// The workspace: counters (0 between launches), then words of 0xff bytes. The kernel leaves it that way, whatever the
// configuration, so one initialisation serves any sequence of launches; no two may use it at once.
constexpr size_t kMergeCountBytes = 2 * kMaxCtas * sizeof(int);
size_t workspace_bytes(LaunchConfig const& config);
void set_workspace(MlaDecodeParams& params, LaunchConfig const& config, void* workspace);

// Enqueues the kernel on the stream, of the current device; nothing else. Fills in what follows from the rest of the
// parameters: divisors, box_rows, gather_16b.
cudaError_t launch_mla_decode(MlaDecodeParams params, LaunchConfig const& config, cudaStream_t stream);

}  // namespace etap
