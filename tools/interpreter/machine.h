// The machine: CTAs of warps that run in a random order, shared memory with its barriers, and what is in flight.
//
// Beside the results, it watches the order of accesses to shared memory with vector clocks, one component a warp and
// one for the copies of the async proxy: an access that no barrier orders after a conflicting one is a race, and a read
// of the async proxy (wgmma, TMA stores) of words written by the generic one needs a proxy fence in between.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "program.h"

namespace ptx {

constexpr int kMaxWarps = 16;
constexpr int kAsync = kMaxWarps;                          // the clock of the async proxy's copies
constexpr uint64_t kSharedWindow = 0x7ffe000000000000ull;  // generic addresses of shared memory

struct Clock {
  uint32_t of[kMaxWarps + 1] = {};
  void join(Clock const& other) {
    for (int i = 0; i <= kMaxWarps; ++i) of[i] = std::max(of[i], other.of[i]);
  }
};

// What synchronisation hands on: everything seen, and of that what a proxy fence has covered.
struct Knowledge {
  Clock seen, fenced;
  void join(Knowledge const& other) {
    seen.join(other.seen);
    fenced.join(other.fenced);
  }
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Host memory that kernels may touch.
class Memory {
 public:
  void allow(uint64_t begin, uint64_t bytes, bool writable) {
    if (bytes) regions_[begin] = {begin + bytes, writable};
  }
  bool allowed(uint64_t begin, uint64_t bytes, bool write) const {
    auto it = regions_.upper_bound(begin);
    if (it == regions_.begin()) return false;
    --it;
    return begin + bytes <= it->second.end && (!write || it->second.writable);
  }

 private:
  struct Region {
    uint64_t end;
    bool writable;
  };
  std::map<uint64_t, Region> regions_;
};

// What a TMA descriptor says; it lies in the 128 bytes of a CUtensorMap.
struct TensorMap {
  static constexpr uint64_t kMagic = 0x7061d4a570a57e45ull;
  uint64_t magic, base;
  uint64_t dims[5], strides[4];  // of dimensions 1 to 4, in bytes
  uint32_t box[5];
  uint16_t rank, element_bytes;
  uint16_t swizzle;  // XOR of bits 4 and up with bits 7 and up: 0, 1, 2 or 3 of them
};
static_assert(sizeof(TensorMap) <= 128);

struct Mbarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  bool valid = false;
  Knowledge knowledge;
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  uint32_t generation = 0;
  bool any = false, last_any = false;
  Knowledge knowledge, last;
};

struct Cta;

// Lanes of a warp that are at the same instruction.
struct Group {
  uint32_t mask = 0;
  int pc = 0;
  enum Block : uint8_t { None, Converge, Named, Phase } block = None;
  uint32_t where = 0, until = 0;  // Named: barrier and generation; Phase: address and parity
  bool arrived = false;           // at the named barrier that it is at
};

struct CopyAsync {  // one warp's cp.async, or its arrival at a barrier
  bool arrive = false;
  uint32_t mask = 0;
  uint32_t shared[kLanes];
  uint64_t global[kLanes];
  uint32_t bytes = 0, source_bytes[kLanes];
  int pc = 0;
};

struct TensorCopy {
  TensorMap map;
  uint32_t shared, barrier;
  int32_t at[5];
  Knowledge issued;
  int warp, pc;
  bool late;  // hardly ever completes while anything else can go on
};

struct InFlight {  // what a wgmma reads, to see that it stays so until it has been waited for
  std::vector<std::pair<uint32_t, uint32_t>> ranges;  // address, bytes
  uint64_t hash;
  int pc;
};

struct Warp {
  Cta* cta = nullptr;
  int index = 0;
  std::vector<uint32_t> reg32, preds;
  std::vector<uint64_t> reg64;
  std::vector<Group> groups;
  Knowledge knowledge;
  bool slow = false;
  uint64_t executed = 0;  // instructions; those of diverged groups one after the other
  std::deque<CopyAsync> copies;
  std::vector<std::vector<InFlight>> wgmma;  // by group; the last is not committed yet
  bool done() const { return groups.empty(); }
  uint32_t alive() const {
    uint32_t mask = 0;
    for (auto const& g : groups) mask |= g.mask;
    return mask;
  }
  uint32_t& clock() { return knowledge.seen.of[index]; }
};

struct Word {  // of shared memory: who wrote it last, and who has read it since
  uint32_t writer = ~0u, written = 0;
  uint32_t read[kMaxWarps] = {};
  int pc = -1;  // of the latest read
};

// Words that a CTA has stored to global memory and no other has seen yet. They arrive there in any order.
class StoreBuffer {
 public:
  void put(uint64_t address, uint32_t value) {
    auto const [it, fresh] = where_.try_emplace(address, words_.size());
    if (fresh)
      words_.emplace_back(address, value);
    else
      words_[it->second].second = value;
  }
  uint32_t const* find(uint64_t address) const {
    auto const it = where_.find(address);
    return it == where_.end() ? nullptr : &words_[it->second].second;
  }
  size_t size() const { return words_.size(); }
  void drain(size_t index) {
    auto const [address, value] = words_[index];
    std::memcpy(reinterpret_cast<void*>(address), &value, 4);
    where_.erase(address);
    if (index + 1 < words_.size()) {
      words_[index] = words_.back();
      where_[words_[index].first] = index;
    }
    words_.pop_back();
  }
  void drain_all() {
    while (!words_.empty()) drain(words_.size() - 1);
  }

 private:
  std::vector<std::pair<uint64_t, uint32_t>> words_;
  std::unordered_map<uint64_t, size_t> where_;
};

struct Cta {
  int index = 0;
  StoreBuffer stores;
  std::vector<uint8_t> shared;
  std::vector<Word> words;
  std::vector<Warp> warps;
  std::unordered_map<uint32_t, Mbarrier> barriers;
  NamedBarrier named[16];
  std::vector<TensorCopy> tensor_copies;
  uint32_t async_clock = 0;
};

// How far a warp had come, in instructions, when it executed one that concerns other warps, memory or the tensor core.
struct Milestone {
  int warp;
  uint64_t executed;
  std::string instruction;
};

struct Options {
  uint64_t seed = 0;
  int watched_cta = -1;                        // whose milestones are noted
  std::vector<Milestone>* milestones = nullptr;
  bool check_races = true;
  uint64_t max_steps = 100'000'000;
};

struct Launch {
  Module const* module;
  Kernel const* kernel;
  uint32_t grid = 1, block = 1;
  size_t shared_bytes = 0;
  std::vector<uint8_t> params;
};

class Machine {
 public:
  Machine(Launch const& launch, Memory const& memory, Options const& options);
  // Runs to the end. Throws Error on a deadlock, a bad access, a race, and the like.
  void run();
  uint64_t steps() const { return steps_; }

 private:
  // scheduling (machine.cpp)
  bool runnable(Warp& w, Group& g);
  bool step_warp(Warp& w);
  void run_group(Warp& w, int index, int quantum);
  void note_milestone(Warp const& w, Instruction const& i);
  void merge_groups(Warp& w);
  bool progress_async(Cta& cta, bool late_too);
  std::string state() const;
  std::string where(int pc) const;
  [[noreturn]] void fail(Warp const& w, int pc, std::string const& what) const;

  // barriers
  bool arrive_named(Warp& w, int pc, uint32_t id, uint32_t threads, bool any);
  void arrive(Warp& w, int pc, uint32_t address, int count);
  void complete_phase(Mbarrier& b);
  bool phase_done(Cta& cta, uint32_t address, uint32_t parity) const;
  void release(Warp& w, Knowledge& to);

  // global memory, as a CTA sees it
  void read_global(Cta const& cta, uint64_t from, void* to, uint32_t bytes) const;
  void write_global(Cta& cta, uint64_t to, void const* from, uint32_t bytes);

  // copies in flight
  void finish_tensor_copy(Cta& cta, size_t index);
  void finish_copy(Warp& w);

  // shared memory
  void check_read(Warp& w, int pc, uint32_t address, uint32_t bytes, bool async_proxy);
  void check_write(Warp& w, int pc, uint32_t address, uint32_t bytes);
  void bounds(Warp const& w, int pc, uint32_t address, uint64_t bytes, uint32_t alignment) const;

  // instructions (execute.cpp, tensor.cpp). `go`: what the group does next.
  enum class Next { Continue, Yield, Blocked };
  Next execute(Warp& w, Group& g, Instruction const& i, uint32_t mask);
  void arithmetic(Warp& w, Instruction const& i, uint32_t mask);
  void convert(Warp& w, Instruction const& i, uint32_t mask);
  void load(Warp& w, int pc, Instruction const& i, uint32_t mask);
  void store(Warp& w, int pc, Instruction const& i, uint32_t mask);
  void atomic(Warp& w, int pc, Instruction const& i, uint32_t mask);
  void shuffle(Warp& w, Instruction const& i, uint32_t mask);
  void load_matrix(Warp& w, int pc, Instruction const& i, uint32_t mask);
  void store_matrix(Warp& w, int pc, Instruction const& i, uint32_t mask);
  void wgmma(Warp& w, int pc, Instruction const& i);
  void wgmma_wait(Warp& w, Instruction const& i);
  void issue_copy(Warp& w, int pc, Instruction const& i, uint32_t mask);
  void issue_tensor_copy(Warp& w, int pc, Instruction const& i, uint32_t mask);
  bool aligned_mask(Warp& w, Group& g, uint32_t needed);
  uint64_t hash(Cta const& cta, InFlight const& f) const;

  // operands
  uint32_t const* lanes32(Warp const& w, Operand const& o) const;
  uint64_t const* lanes64(Warp const& w, Operand const& o) const;
  uint64_t lane(Warp const& w, Operand const& o, int lane) const;
  uint32_t pred(Warp const& w, Operand const& o) const;
  void set_pred(Warp& w, Operand const& o, uint32_t bits, uint32_t mask);
  uint64_t address(Warp const& w, Operand const& o, int lane) const;
  static int first(uint32_t mask) { return __builtin_ctz(mask); }

  Launch const& launch_;
  Memory const& memory_;
  Options options_;
  std::mt19937_64 random_;
  std::vector<Cta> ctas_;
  std::vector<Warp*> live_;
  // How this launch is scheduled: one copy in so many is late, one warp in so many is slow (0: none).
  uint32_t late_copies_ = 0, slow_warps_ = 0;
  uint64_t steps_ = 0;

  friend struct Lanes;
};

}  // namespace ptx
