// The part of the FlashInfer adapter that is compiled once a module: the switch, the counts and the launch. No device
// code; a .cu file, because FlashInfer finds CUDA's headers through nvcc alone where the toolkit is in several places.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../ops/switch.h"
#include "../ops/workspace.h"
#include "call.h"
#include "etap/launch.h"

#if !defined(ETAP_MODULE) || !defined(ETAP_MAX_ROWS)
#error "ETAP_MODULE, ETAP_MAX_ROWS: the module's name, its limit of query rows (see etap_integration/flashinfer/jit.py)"
#endif

namespace etap::flashinfer {
namespace {

constexpr int kDefaultPParts = 0;    // as the GPU's default is

Switch<kNumReasons> g_switch("ETAP_FLASHINFER");
std::atomic<int> g_max_rows{ETAP_MAX_ROWS};
std::atomic<int> g_p_parts{kDefaultPParts};
thread_local Reason t_last_reason = Reason::kTaken;

void check(cudaError_t status, char const* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next check elsewhere would report it again
  throw std::runtime_error(std::string("ETAP: ") + what + ": " + cudaGetErrorString(status));
}

}  // namespace

bool accept(Call const& call) {
  int const mode = g_switch.checked_mode();
  Reason const reason = mode == kNever ? Reason::kSwitchedOff : judge(call, g_max_rows.load(std::memory_order_relaxed));
  t_last_reason = reason;
  g_switch.note(static_cast<int>(reason));
  if (reason == Reason::kTaken) return true;
  if (mode == kAlways && reason != Reason::kEmpty) {
    throw std::runtime_error(std::string("ETAP_FLASHINFER=always, but ETAP cannot run this call: ") +
                             kReasons[static_cast<int>(reason)]);
  }
  return false;
}

void launch(Call const& call, int device, cudaStream_t stream) {
  MlaDecodeParams params = call.params;
  params.heads_divmod = cutlass::FastDivmod(params.num_heads);
  params.page_divmod = cutlass::FastDivmod(params.page_size);
  LaunchConfig config{};
  config.dtype = call.q == Element::kBf16 ? Dtype::kBf16 : Dtype::kFp16;
  config.cache = call.ckv == Element::kE4m3 ? CacheFormat::kE4m3 : CacheFormat::kQueryType;
  config.row_tile = row_tile_for(int64_t(params.num_heads) * params.q_len, config.cache);
  config.p_parts = g_p_parts.load(std::memory_order_relaxed);
  config.num_ctas = static_cast<int>(std::min<int64_t>(call.num_sm, kMaxCtas));
  check(acquire_workspace(device, stream, config, &params.workspace), "workspace");
  check(launch_mla_decode(params, config, stream), "launch");
}

}  // namespace etap::flashinfer

// For tests, logs and the switch: etap_integration.flashinfer, or ctypes.CDLL of the module's file.
#define ETAP_EXPORT extern "C" __attribute__((visibility("default")))
#define ETAP_STRING_OF(text) #text
#define ETAP_STRING(text) ETAP_STRING_OF(text)

// The name this module was built under: proves that it is the patched one.
ETAP_EXPORT char const* etap_flashinfer_module() { return ETAP_STRING(ETAP_MODULE); }

// 0 auto, 1 always, 2 never; -1 if ETAP_FLASHINFER has another value.
ETAP_EXPORT int etap_flashinfer_mode() { return etap::flashinfer::g_switch.mode(); }

// Returns the previous mode, or -2, changing nothing, for one that does not exist.
ETAP_EXPORT int etap_flashinfer_set_mode(int mode) { return etap::flashinfer::g_switch.set_mode(mode); }

// Most query rows (tokens x heads) of a call that ETAP takes. Returns the previous limit, or -1 for a negative one.
ETAP_EXPORT int etap_flashinfer_set_max_rows(int rows) {
  return rows < 0 ? -1 : etap::flashinfer::g_max_rows.exchange(rows, std::memory_order_relaxed);
}

// 2: P in a high and a low 16-bit part; 1: rounded; 0 (default): 2, but 1 on an H20 and for an e4m3 cache. Returns the
// previous number, or -1 for another one.
ETAP_EXPORT int etap_flashinfer_set_p_parts(int parts) {
  return parts < 0 || parts > 2 ? -1 : etap::flashinfer::g_p_parts.exchange(parts, std::memory_order_relaxed);
}

// Reasons are numbered from 0, "taken".
ETAP_EXPORT int etap_flashinfer_num_reasons() { return etap::flashinfer::kNumReasons; }

ETAP_EXPORT char const* etap_flashinfer_reason(int reason) {
  bool const known = reason >= 0 && reason < etap::flashinfer::kNumReasons;
  return known ? etap::flashinfer::kReasons[reason] : nullptr;
}

// Calls of this module, by reason.
ETAP_EXPORT uint64_t etap_flashinfer_count(int reason) { return etap::flashinfer::g_switch.count(reason); }

ETAP_EXPORT void etap_flashinfer_reset_counts() { etap::flashinfer::g_switch.reset_counts(); }

// Of the calling thread's last call.
ETAP_EXPORT int etap_flashinfer_last_reason() { return static_cast<int>(etap::flashinfer::t_last_reason); }
