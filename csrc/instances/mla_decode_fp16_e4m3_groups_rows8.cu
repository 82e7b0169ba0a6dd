#include "etap/instance.cuh"

ETAP_INSTANCE_GROUPS(fp16, __half, 8)
