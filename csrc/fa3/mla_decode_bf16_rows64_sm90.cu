#include "conversions.h"
#include "../instances/mla_decode_bf16_rows64.cu"
