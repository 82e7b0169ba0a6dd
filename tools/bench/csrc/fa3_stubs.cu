// FlashAttention-3's host code names every instance of head dim 64. The benchmark builds the 64/512 ones alone; the
// others are defined here so that the library loads, and stop the program if one is ever called.
#include <cutlass/numeric_types.h>

#include <cstdio>
#include <cstdlib>

#include "flash.h"

namespace {

[[noreturn]] void not_built(int head_dim_v) {
    std::fprintf(stderr, "FlashAttention-3 with head dims 64/%d is not part of this build\n", head_dim_v);
    std::abort();
}

}  // namespace

#define ETAP_STUB(HEAD_DIM_V, SPLIT, PAGED, PACK_GQA)                                                               \
    template <>                                                                                                     \
    void run_mha_fwd_<90, cutlass::bfloat16_t, 64, HEAD_DIM_V, SPLIT, PAGED, false, PACK_GQA>(Flash_fwd_params&,    \
                                                                                              cudaStream_t) {       \
        not_built(HEAD_DIM_V);                                                                                      \
    }
#define ETAP_STUBS(HEAD_DIM_V)                \
    ETAP_STUB(HEAD_DIM_V, false, false, false) \
    ETAP_STUB(HEAD_DIM_V, false, false, true)  \
    ETAP_STUB(HEAD_DIM_V, true, false, true)   \
    ETAP_STUB(HEAD_DIM_V, false, true, true)   \
    ETAP_STUB(HEAD_DIM_V, true, true, true)

ETAP_STUBS(64)
ETAP_STUBS(256)
