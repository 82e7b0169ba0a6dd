// The part of the FlashAttention-3 adapter that is compiled once: the switch, the counts and the launch. No device
// code; the name ends as it does so that upstream compiles it for sm_90a alone.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../ops/workspace.h"
#include "etap/launch.h"
#include "fa3/call.h"

namespace etap::fa3 {
namespace {

enum Mode { kAuto, kAlways, kNever, kNumModes };
constexpr char const* kModes[kNumModes] = {"auto", "always", "never"};
constexpr int kUnread = -2, kInvalid = -1;  // of the mode: ETAP_FA3 was not looked at yet, or means nothing
constexpr int kDefaultMaxRows = 64;
constexpr int kDefaultPParts = 0;           // as the GPU's default is

std::atomic<int> g_mode{kUnread};
std::atomic<int> g_max_rows{kDefaultMaxRows};
std::atomic<int> g_p_parts{kDefaultPParts};
std::atomic<int> g_only_where_faster{1};
std::atomic<uint64_t> g_counts[kNumReasons];
thread_local Reason t_last_reason = Reason::kTaken;

int mode_from_environment() {
  char const* const value = std::getenv("ETAP_FA3");
  if (!value || !*value) return kAuto;
  for (int i = 0; i < kNumModes; ++i) {
    if (std::string(value) == kModes[i]) return i;
  }
  return kInvalid;
}

int current_mode() {
  int mode = g_mode.load(std::memory_order_relaxed);
  if (mode != kUnread) return mode;
  int const read = mode_from_environment();
  return g_mode.compare_exchange_strong(mode, read, std::memory_order_relaxed) ? read : mode;
}

void note(Reason reason) {
  t_last_reason = reason;
  g_counts[static_cast<int>(reason)].fetch_add(1, std::memory_order_relaxed);
}

void check(cudaError_t status, char const* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next check elsewhere would report it again
  throw std::runtime_error(std::string("ETAP: ") + what + ": " + cudaGetErrorString(status));
}

}  // namespace

void note_not_mla() { note(Reason::kNotMla); }

bool accept(Call const& call) {
  int const mode = current_mode();
  if (mode == kInvalid) {
    char const* const value = std::getenv("ETAP_FA3");
    throw std::runtime_error(std::string("ETAP_FA3=") + (value ? value : "") + ": expected auto, always or never");
  }
  Reason reason = mode == kNever ? Reason::kSwitchedOff : judge(call, g_max_rows.load(std::memory_order_relaxed));
  if (reason == Reason::kTaken && mode == kAuto && g_only_where_faster.load(std::memory_order_relaxed) &&
      upstream_is_faster(call)) {
    reason = Reason::kSlower;
  }
  note(reason);
  if (reason == Reason::kTaken) return true;
  if (mode == kAlways && reason != Reason::kEmpty) {
    throw std::runtime_error(std::string("ETAP_FA3=always, but ETAP cannot run this call: ") +
                             kReasons[static_cast<int>(reason)]);
  }
  return false;
}

void launch(Call const& call, int device, cudaStream_t stream) {
  MlaDecodeParams params = call.params;
  LaunchConfig config;
  config.dtype = call.is_bf16 ? Dtype::kBf16 : Dtype::kFp16;
  config.cache = call.cache_is_e4m3 ? CacheFormat::kE4m3 : CacheFormat::kQueryType;
  config.row_tile = row_tile_for(int64_t(params.num_heads) * params.q_len, config.cache);
  config.p_parts = g_p_parts.load(std::memory_order_relaxed);
  config.num_ctas = std::min(call.num_sm, kMaxCtas);
  check(acquire_workspace(device, stream, config, &params.workspace), "workspace");
  check(launch_mla_decode(params, config, stream), "launch");
}

}  // namespace etap::fa3

// For tests, logs and the switch: ctypes.CDLL(flash_attn_3._C.__file__).
#define ETAP_EXPORT extern "C" __attribute__((visibility("default")))

// 0 auto, 1 always, 2 never; -1 if ETAP_FA3 has another value.
ETAP_EXPORT int etap_fa3_mode() { return etap::fa3::current_mode(); }

// Returns the previous mode, or -2, changing nothing, for one that does not exist.
ETAP_EXPORT int etap_fa3_set_mode(int mode) {
  using namespace etap::fa3;
  if (mode < 0 || mode >= kNumModes) return -2;
  int const previous = current_mode();
  g_mode.store(mode, std::memory_order_relaxed);
  return previous;
}

// Most query rows (tokens x heads) of a call that ETAP takes. Returns the previous limit, or -1 for a negative one.
ETAP_EXPORT int etap_fa3_set_max_rows(int rows) {
  return rows < 0 ? -1 : etap::fa3::g_max_rows.exchange(rows, std::memory_order_relaxed);
}

// Whether "auto" leaves to upstream what that was measured faster at (1, default) or not (0). Returns what held before.
ETAP_EXPORT int etap_fa3_set_only_where_faster(int on) {
  return etap::fa3::g_only_where_faster.exchange(on != 0, std::memory_order_relaxed);
}

// 2: P in a high and a low 16-bit part; 1: rounded; 0 (default): 2, but 1 on an H20 and for an
// e4m3 cache. Returns the previous number, or -1 for another one.
ETAP_EXPORT int etap_fa3_set_p_parts(int parts) {
  return parts < 0 || parts > 2 ? -1 : etap::fa3::g_p_parts.exchange(parts, std::memory_order_relaxed);
}

// Reasons are numbered from 0, "taken".
ETAP_EXPORT int etap_fa3_num_reasons() { return etap::fa3::kNumReasons; }

ETAP_EXPORT char const* etap_fa3_reason(int reason) {
  return reason < 0 || reason >= etap::fa3::kNumReasons ? nullptr : etap::fa3::kReasons[reason];
}

// Calls of this process, by reason.
ETAP_EXPORT uint64_t etap_fa3_count(int reason) {
  if (reason < 0 || reason >= etap::fa3::kNumReasons) return 0;
  return etap::fa3::g_counts[reason].load(std::memory_order_relaxed);
}

ETAP_EXPORT void etap_fa3_reset_counts() {
  for (auto& count : etap::fa3::g_counts) count.store(0, std::memory_order_relaxed);
}

// Of the calling thread's last call.
ETAP_EXPORT int etap_fa3_last_reason() { return static_cast<int>(etap::fa3::t_last_reason); }
