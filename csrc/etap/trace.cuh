// When each CTA of a launch came to what, to see what a launch waits for: `python -m tools.bench trace`. Compiled in
// with -DETAP_TRACE alone.
#pragma once

#include "sm90.cuh"

namespace etap {

// In the order in which a CTA comes to them. Of several pieces: of the last, but kLookedUp and kQueryThere of the
// first.
enum Event {
  kStarted,       // the kernel's first statement, in the warp that plans
  kPlanned,       // plan and first piece are in shared memory
  kLookedUp,      // the first page-table entries are there; the first copy is issued next
  kQueryThere,    // Q is in shared memory
  kScored,        // S^T of the first tile (16-bit caches; not wide)
  kTilesDone,     // warpgroup 0 is through with the tiles
  kPieceDone,     // results are stored, partial ones on their way
  kStatsThere,    // merge: statistics of all parts
  kEnded,         // a consumer's last statement
  kEvents
};

#if defined(ETAP_TRACE)
struct TraceEntry {
  uint64_t ns;      // globaltimer: the same for all SMs, but coarse on some GPUs
  uint64_t cycles;  // of this SM
};
static __device__ TraceEntry g_trace[kMaxCtas][kEvents];

ETAP_DEVICE void trace(Event event, bool here) {
  if (!here) return;
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  g_trace[blockIdx.x][event] = {ns, uint64_t(clock64())};
}

// The entries of the last launch of the instances in this file, and none: the next launch writes its own.
inline cudaError_t take_trace(void* entries) {
  cudaError_t status = cudaMemcpyFromSymbol(entries, g_trace, sizeof(g_trace));
  void* address = nullptr;
  if (status == cudaSuccess) status = cudaGetSymbolAddress(&address, g_trace);
  if (status == cudaSuccess) status = cudaMemset(address, 0, sizeof(g_trace));
  return status;
}
#else
ETAP_DEVICE void trace(Event, bool) {}
#endif

}  // namespace etap
