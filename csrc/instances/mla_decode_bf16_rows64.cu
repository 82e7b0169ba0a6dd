#include "etap/instance.cuh"

ETAP_INSTANCE(bf16, __nv_bfloat16, 64)
