#include "../ops/launch.cpp"
