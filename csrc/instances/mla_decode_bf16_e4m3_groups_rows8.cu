#include "etap/instance.cuh"

ETAP_INSTANCE_GROUPS(bf16, __nv_bfloat16, 8)
