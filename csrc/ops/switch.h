// The run-time switch of an upstream adapter, and the counts of what became of its calls. Host C++ only.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace etap {

enum SwitchMode { kAuto, kAlways, kNever, kNumModes };

template <int NumReasons>
class Switch {
 public:
  static constexpr int kInvalid = -1, kUnknownMode = -2;

  // variable: of the environment; read once, when the mode is first asked for.
  explicit constexpr Switch(char const* variable) : variable_(variable) {}

  // kAuto, kAlways or kNever; kInvalid if the variable has another value.
  int mode() {
    int mode = mode_.load(std::memory_order_relaxed);
    if (mode != kUnread) return mode;
    int const read = from_environment();
    return mode_.compare_exchange_strong(mode, read, std::memory_order_relaxed) ? read : mode;
  }

  // The same; throws std::runtime_error in place of kInvalid.
  int checked_mode() {
    int const found = mode();
    if (found != kInvalid) return found;
    char const* const value = std::getenv(variable_);
    throw std::runtime_error(std::string(variable_) + "=" + (value ? value : "") + ": expected auto, always or never");
  }

  // Returns the previous mode, or kUnknownMode, changing nothing, for one that does not exist.
  int set_mode(int mode) {
    if (mode < 0 || mode >= kNumModes) return kUnknownMode;
    int const previous = this->mode();
    mode_.store(mode, std::memory_order_relaxed);
    return previous;
  }

  void note(int reason) { counts_[reason].fetch_add(1, std::memory_order_relaxed); }
  uint64_t count(int reason) const {
    return reason < 0 || reason >= NumReasons ? 0 : counts_[reason].load(std::memory_order_relaxed);
  }
  void reset_counts() {
    for (auto& count : counts_) count.store(0, std::memory_order_relaxed);
  }

 private:
  static constexpr int kUnread = -3;

  int from_environment() const {
    static constexpr char const* kNames[kNumModes] = {"auto", "always", "never"};
    char const* const value = std::getenv(variable_);
    if (!value || !*value) return kAuto;
    for (int i = 0; i < kNumModes; ++i) {
      if (std::string(value) == kNames[i]) return i;
    }
    return kInvalid;
  }

  char const* const variable_;
  std::atomic<int> mode_{kUnread};
  std::atomic<uint64_t> counts_[NumReasons] = {};
};

}  // namespace etap
