// Workspaces (launch.h) for the merge inside the kernel, kept from launch to launch.
#pragma once

#include <cuda_runtime_api.h>

#include "etap/launch.h"

namespace etap {

// An initialised workspace for launches of `config` that no launch overlapping with one on `stream` uses: each stream
// has its own for each number of CTAs and row tile, and each CUDA graph being captured, which gives it back when the
// last graph made from it is destroyed. Waits for the device only where a capture needs a new one. Thread-safe.
cudaError_t acquire_workspace(int device, cudaStream_t stream, LaunchConfig const& config, void** workspace);

}  // namespace etap
