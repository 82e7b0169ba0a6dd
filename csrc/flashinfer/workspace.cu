#include "../ops/workspace.cpp"
