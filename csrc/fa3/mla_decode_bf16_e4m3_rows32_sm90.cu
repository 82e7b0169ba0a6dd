#include "conversions.h"
#include "../instances/mla_decode_bf16_e4m3_rows32.cu"
