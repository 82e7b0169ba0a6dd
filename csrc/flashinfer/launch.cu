#define ETAP_WITHOUT_GROUPS
#include "../ops/launch.cpp"
