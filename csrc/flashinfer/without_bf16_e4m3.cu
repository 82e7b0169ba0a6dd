#include "absent.h"

ETAP_ABSENT(bf16_e4m3)
