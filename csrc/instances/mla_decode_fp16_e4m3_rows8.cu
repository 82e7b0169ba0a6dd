#include "etap/instance.cuh"

ETAP_INSTANCE_E4M3(fp16, __half, 8)
