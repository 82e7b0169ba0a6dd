#include "absent.h"

ETAP_ABSENT(bf16)
