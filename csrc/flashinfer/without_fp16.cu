#include "absent.h"

ETAP_ABSENT(fp16)
ETAP_ABSENT_TILE(fp16, 64)
