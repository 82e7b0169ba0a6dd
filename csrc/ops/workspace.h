// Workspaces for the merge inside the kernel, kept between launches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace etap {

// A workspace of at least `bytes`, initialised, that no launch overlapping with one on `stream` uses: each stream has
// its own, and each CUDA graph being captured, which gives it back when the last graph made from it is destroyed.
// Never waits for the device, except while the first call of a capture allocates. Thread-safe.
cudaError_t acquire_workspace(int device, cudaStream_t stream, size_t bytes, void** workspace);

}  // namespace etap
