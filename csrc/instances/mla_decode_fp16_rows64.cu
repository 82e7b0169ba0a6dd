#include "etap/instance.cuh"

ETAP_INSTANCE(fp16, __half, 64)
