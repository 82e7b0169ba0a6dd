#include "etap/instance.cuh"

ETAP_INSTANCE_E4M3(bf16, __nv_bfloat16, 32)
