// TMA descriptors of one launch's caches.
#pragma once

#include <cuda.h>

namespace etap {

// Of the latent and the rope part: boxes of box_rows rows, and, where these are whole tiles, of kEndRows, for a tile
// that the length ends in: what lies behind it in its page need not be read.
struct CacheMaps {
  CUtensorMap ckv, kpe, ckv_end, kpe_end;
};
constexpr int kEndRows = 16;

}  // namespace etap
