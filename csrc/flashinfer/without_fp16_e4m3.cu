#include "absent.h"

ETAP_ABSENT(fp16_e4m3)
