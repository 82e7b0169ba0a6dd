// Stands for the kernels that a module's dtypes have no use for, so that it need not compile them; judge() lets no such
// call through.
#pragma once

#include "etap/cache_maps.h"
#include "etap/launch.h"

#define ETAP_ABSENT_TILE(NAME, ROW_TILE)                                                                    \
  namespace etap {                                                                                          \
  cudaError_t launch_##NAME##_##ROW_TILE(int, MlaDecodeParams const&, CacheMaps const&, int, cudaStream_t) { \
    return cudaErrorNotSupported;                                                                           \
  }                                                                                                         \
  }
#define ETAP_ABSENT(NAME)   \
  ETAP_ABSENT_TILE(NAME, 8)  \
  ETAP_ABSENT_TILE(NAME, 16) \
  ETAP_ABSENT_TILE(NAME, 32)
