#include "conversions.h"
#include "../instances/mla_decode_bf16_rows8.cu"
