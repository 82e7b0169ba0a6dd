#include "absent.h"

ETAP_ABSENT(fp16)
