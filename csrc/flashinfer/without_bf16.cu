#include "absent.h"

ETAP_ABSENT(bf16)
ETAP_ABSENT_TILE(bf16, 64)
