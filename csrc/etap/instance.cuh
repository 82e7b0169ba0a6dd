// Body of the files in csrc/instances/: one query type, cache format and row tile each, with P in one and in two parts.
#pragma once

#include <atomic>

#include "kernel.cuh"
#include "launch.h"

namespace etap {

// Lets the kernel use its shared memory, once per device. `static`, or the loader would share `ready` between the
// operator library and a patched upstream in one process, each of which has a kernel of its own.
template <class T, class Cfg>
static cudaError_t allow_shared() {
  static std::atomic<uint64_t> ready{0};  // one bit a device
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess || (device < 64 && ready.load(std::memory_order_relaxed) >> device & 1)) return status;
  status = cudaFuncSetAttribute(mla_decode_kernel<T, Cfg>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                Cfg::kSharedBytes);
  if (status == cudaSuccess && device < 64) ready.fetch_or(uint64_t(1) << device, std::memory_order_relaxed);
  return status;
}

template <class T, class Cfg>
cudaError_t launch_instance(MlaDecodeParams const& params, CacheMaps const& maps, int num_ctas, cudaStream_t stream) {
  static_assert(sizeof(SharedStorage<Cfg>) <= Cfg::kSharedBytes && Cfg::kSharedBytes <= kMaxSharedBytes);
  cudaError_t const status = allow_shared<T, Cfg>();
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;  // the merge waits for other CTAs: all must be resident
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_ctas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Cfg::kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, mla_decode_kernel<T, Cfg>, params, maps);
}

}  // namespace etap

#if defined(ETAP_TRACE)  // for tools/bench/trace.py
#define ETAP_TAKE_TRACE(NAME) \
  extern "C" int etap_trace_##NAME(void* entries) { return etap::take_trace(entries); }
#else
#define ETAP_TAKE_TRACE(NAME)
#endif

#define ETAP_INSTANCE_OF(NAME, T, ROW_TILE, FORMAT)                                                               \
  namespace etap {                                                                                                \
  cudaError_t launch_##NAME##_##ROW_TILE(int p_parts, MlaDecodeParams const& params, CacheMaps const& maps,       \
                                         int num_ctas, cudaStream_t stream) {                                     \
    return p_parts == 2 ? launch_instance<T, TileConfig<ROW_TILE, 2, FORMAT>>(params, maps, num_ctas, stream)     \
                        : launch_instance<T, TileConfig<ROW_TILE, 1, FORMAT>>(params, maps, num_ctas, stream);    \
  }                                                                                                               \
  }                                                                                                               \
  ETAP_TAKE_TRACE(NAME##_##ROW_TILE)
#define ETAP_INSTANCE(NAME, T, ROW_TILE) ETAP_INSTANCE_OF(NAME, T, ROW_TILE, CacheFormat::kQueryType)
#define ETAP_INSTANCE_E4M3(NAME, T, ROW_TILE) ETAP_INSTANCE_OF(NAME##_e4m3, T, ROW_TILE, CacheFormat::kE4m3)
#define ETAP_INSTANCE_GROUPS(NAME, T, ROW_TILE)                                   \
  ETAP_INSTANCE_OF(NAME##_e4m3_groups, T, ROW_TILE, CacheFormat::kE4m3Groups)      \
  ETAP_INSTANCE_OF(NAME##_e4m3_groups_rope16, T, ROW_TILE, CacheFormat::kE4m3GroupsRope16)
