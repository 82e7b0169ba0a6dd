// Stands for the bfloat16 kernels in a module whose query is float16; judge() lets no such call through.
#include <cuda.h>

#include "etap/launch.h"

#define ETAP_ABSENT(ROW_TILE)                                                                                  \
  namespace etap {                                                                                             \
  cudaError_t launch_bf16_##ROW_TILE(int, MlaDecodeParams const&, CUtensorMap const&, CUtensorMap const&, int, \
                                     cudaStream_t) {                                                           \
    return cudaErrorNotSupported;                                                                              \
  }                                                                                                            \
  }
ETAP_ABSENT(8)
ETAP_ABSENT(16)
ETAP_ABSENT(32)
