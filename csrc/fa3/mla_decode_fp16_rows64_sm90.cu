#include "conversions.h"
#include "../instances/mla_decode_fp16_rows64.cu"
