// Scheduling, barriers, copies in flight, and the watch over shared memory.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <sstream>

namespace ptx {

Machine::Machine(Launch const& launch, Memory const& memory, Options const& options)
    : launch_(launch), memory_(memory), options_(options), random_(options.seed * 2 + 1) {
  int const warps = int(launch.block / kLanes);
  if (launch.block % kLanes || warps > kMaxWarps) throw Error("block of " + std::to_string(launch.block) + " threads");
  ctas_.resize(launch.grid);
  for (uint32_t c = 0; c < launch.grid; ++c) {
    Cta& cta = ctas_[c];
    cta.index = int(c);
    cta.shared.assign(launch.shared_bytes, 0xff);
    if (options.check_races) cta.words.resize(launch.shared_bytes / 4 + 1);
    cta.warps.resize(warps);
    for (int n = 0; n < warps; ++n) {
      Warp& w = cta.warps[n];
      w.cta = &cta;
      w.index = n;
      w.reg32.assign(size_t(launch.kernel->num_reg32) * kLanes, 0xdeadbeef);
      w.reg64.assign(size_t(launch.kernel->num_reg64) * kLanes, 0xdeadbeefdeadbeef);
      w.preds.assign(launch.kernel->num_preds, 0xa5a5a5a5);
      w.groups.push_back({~0u, 0});
      w.wgmma.emplace_back();
      w.clock() = 1;
      for (auto const& special : launch.kernel->specials) {
        for (int lane = 0; lane < kLanes; ++lane) {
          uint64_t value = 0;
          auto const& s = special.name;
          if (s == "%tid.x")
            value = n * kLanes + lane;
          else if (s == "%ntid.x")
            value = launch.block;
          else if (s == "%ctaid.x")
            value = c;
          else if (s == "%nctaid.x")
            value = launch.grid;
          else if (s == "%laneid")
            value = lane;
          else if (s == "%tid.y" || s == "%tid.z" || s == "%ctaid.y" || s == "%ctaid.z")
            value = 0;
          else if (s == "%cluster_ctarank" || s == "%cluster_ctaid.x")
            value = 0;
          else if (s == "%nctaid.y" || s == "%nctaid.z" || s == "%ntid.y" || s == "%ntid.z")
            value = 1;
          else if (s == "%clock" || s == "%clock64" || s == "%globaltimer")
            value = 0;
          else if (s == "%smid")
            value = c;
          else if (s.rfind("%param+", 0) == 0)
            value = uint64_t(launch.params.data()) + std::stoull(s.substr(7));
          else
            throw Error("special register " + s);
          if (special.is_64)
            w.reg64[size_t(special.reg) * kLanes + lane] = value;
          else
            w.reg32[size_t(special.reg) * kLanes + lane] = uint32_t(value);
        }
      }
    }
  }
  static constexpr uint32_t kOneIn[4] = {0, 0, 16, 128};
  late_copies_ = kOneIn[random_() % 4];
  slow_warps_ = kOneIn[random_() % 4] / 4;
  for (auto& cta : ctas_) {
    for (auto& w : cta.warps) {
      w.slow = slow_warps_ && random_() % slow_warps_ == 0;
      live_.push_back(&w);
    }
  }
}

void Machine::fail(Warp const& w, int pc, std::string const& what) const {
  std::ostringstream out;
  out << what << " (CTA " << w.cta->index << ", warp " << w.index << ", " << where(pc) << ")";
  throw Error(out.str());
}

std::string Machine::where(int pc) const {
  auto const& code = launch_.kernel->code;
  if (pc < 0 || pc >= int(code.size()) || code[pc].line < 1) return "instruction " + std::to_string(pc);
  return "PTX line " + std::to_string(code[pc].line) + ": " + launch_.module->line(code[pc].line);
}

void Machine::run() {
  while (!live_.empty()) {
    size_t const index = random_() % live_.size();
    Warp& w = *live_[index];
    if (random_() % 4 == 0) progress_async(*w.cta, false);
    StoreBuffer& stores = ctas_[random_() % ctas_.size()].stores;
    for (size_t n = random_() % 64; n > 0 && stores.size(); --n) stores.drain(random_() % stores.size());
    if (w.slow && random_() % 64) continue;
    if (!step_warp(w)) {
      // Blocked: look for anything that can go on, from here on.
      bool found = false;
      for (size_t n = 1; n < live_.size() && !found; ++n) found = step_warp(*live_[(index + n) % live_.size()]);
      if (!found) {
        for (auto& cta : ctas_) {
          found = progress_async(cta, true) || found || cta.stores.size();
          cta.stores.drain_all();
        }
        if (!found) throw Error("deadlock:\n" + state());
      }
    }
    live_.erase(std::remove_if(live_.begin(), live_.end(), [](Warp* x) { return x->done(); }), live_.end());
    if (steps_ > options_.max_steps) throw Error("no end after " + std::to_string(steps_) + " steps:\n" + state());
  }
  for (auto& cta : ctas_) {
    while (progress_async(cta, true)) {
    }
    cta.stores.drain_all();
    for (auto& w : cta.warps) {
      if (w.wgmma.size() > 1 || !w.wgmma.back().empty()) throw Error("wgmma not waited for at the end");
    }
    for (auto const& b : cta.named) {
      if (b.arrived) throw Error("a named barrier is left with " + std::to_string(b.arrived) + " threads in it");
    }
  }
}

std::string Machine::state() const {
  std::ostringstream out;
  int lines = 0;
  for (auto const* w : live_) {
    for (auto const& g : w->groups) {
      if (++lines > 60) return out.str() + "...";
      out << "  CTA " << w->cta->index << " warp " << w->index << " mask " << std::hex << g.mask << std::dec << " at "
          << where(g.pc)
          << (g.block ? " (blocked: " + std::to_string(g.where) + ", " + std::to_string(g.until) + ")" : "") << "\n";
    }
  }
  for (auto const& cta : ctas_) {
    std::map<uint32_t, Mbarrier> const sorted(cta.barriers.begin(), cta.barriers.end());
    for (auto const& [at, b] : sorted) {
      out << "  CTA " << cta.index << " mbarrier " << at << ": phase " << b.phase << ", " << b.pending << " of "
          << b.expected << " arrivals to come, " << b.bytes << " bytes\n";
    }
  }
  return out.str();
}

bool Machine::runnable(Warp& w, Group& g) {
  switch (g.block) {
    case Group::None:
      return true;
    case Group::Converge:
      return false;
    case Group::Named:
      if (w.cta->named[g.where].generation == g.until) return false;
      break;
    case Group::Phase:
      if (!phase_done(*w.cta, g.where, g.until)) return false;
      break;
  }
  g.block = Group::None;
  return true;
}

// Lets one group of the warp run for a while; false if none can.
bool Machine::step_warp(Warp& w) {
  int chosen = -1, lowest = -1, count = 0;
  for (int i = 0; i < int(w.groups.size()); ++i) {
    if (!runnable(w, w.groups[i])) continue;
    ++count;
    if (random_() % count == 0) chosen = i;
    if (lowest < 0 || w.groups[i].pc < w.groups[lowest].pc) lowest = i;
  }
  if (chosen < 0) {
    bool all = !w.groups.empty();
    for (auto const& g : w.groups) all = all && g.block == Group::Converge;
    if (all) {
      std::string places;
      for (size_t n = 1; n < w.groups.size(); ++n) places += (n > 1 ? ", " : "; others at ") + where(w.groups[n].pc);
      fail(w, w.groups[0].pc, "lanes wait for each other at different instructions" + places);
    }
    return false;
  }
  if (random_() % 8) chosen = lowest;
  static constexpr int kQuanta[8] = {1, 4, 16, 16, 64, 64, 256, 2048};
  run_group(w, chosen, kQuanta[random_() % 8]);
  return true;
}

// Groups at the same instruction become one.
void Machine::merge_groups(Warp& w) {
  for (size_t i = 0; i < w.groups.size(); ++i) {
    for (size_t j = i + 1; j < w.groups.size();) {
      Group &a = w.groups[i], &b = w.groups[j];
      bool const apart = a.block == Group::Named || b.block == Group::Named;
      if (a.pc == b.pc && !apart) {
        a.mask |= b.mask;
        a.block = Group::None;
        w.groups.erase(w.groups.begin() + long(j));
      } else {
        ++j;
      }
    }
  }
}

void Machine::note_milestone(Warp const& w, Instruction const& i) {
  if (w.cta->index != options_.watched_cta || !options_.milestones) return;
  switch (i.op) {
    case Op::Bar:
    case Op::Mbarrier:
    case Op::CpAsync:
    case Op::CpAsyncBulk:
    case Op::WgmmaWait:
    case Op::Exit:
      break;
    case Op::Ld:
    case Op::St:
      if (i.has("global")) break;
      return;
    default:
      return;
  }
  std::string text;
  for (auto const& word : i.words) text += (text.empty() ? "" : ".") + word;
  options_.milestones->push_back({w.index, w.executed, std::move(text)});
}

void Machine::run_group(Warp& w, int index, int quantum) {
  auto const& code = launch_.kernel->code;
  while (quantum-- > 0) {
    Group* g = &w.groups[index];
    Instruction const& i = code[g->pc];
    ++steps_;
    uint32_t mask = g->mask;
    if (i.guard >= 0) mask &= i.guard_negated ? ~w.preds[i.guard] : w.preds[i.guard];
    if (i.op == Op::Bra) {
      ++w.executed;
      uint32_t const stay = g->mask & ~mask;
      if (mask && stay) {
        g->mask = stay;
        ++g->pc;
        w.groups.push_back({mask, int(i.args.back().value)});
        merge_groups(w);
        return;
      }
      g->pc = mask ? int(i.args.back().value) : g->pc + 1;
    } else if (i.op == Op::Exit) {
      ++w.executed;
      if (mask) note_milestone(w, i);
      g->mask &= ~mask;
      ++g->pc;
      if (g->mask == 0) {
        w.groups.erase(w.groups.begin() + index);
        return;
      }
    } else if (mask == 0) {
      ++g->pc;
    } else {
      Next const next = execute(w, *g, i, mask);
      if (next == Next::Blocked) return;
      ++w.executed;
      note_milestone(w, i);
      ++g->pc;
      if (next == Next::Yield) quantum = 0;
    }
    if (w.groups.size() > 1) {
      int const pc = w.groups[index].pc;
      for (auto const& other : w.groups) {
        if (&other != &w.groups[index] && other.pc == pc) {
          merge_groups(w);
          return;
        }
      }
      for (auto const& other : w.groups) {
        if (other.block == Group::None && other.pc < pc) return;  // let it catch up
      }
    }
  }
}

// True where all lanes that an instruction needs are here; else the group waits for them.
bool Machine::aligned_mask(Warp& w, Group& g, uint32_t needed) {
  if ((g.mask & needed & w.alive()) == (needed & w.alive())) return true;
  g.block = Group::Converge;
  return false;
}

// ---- barriers
void Machine::release(Warp& w, Knowledge& to) {
  to.join(w.knowledge);
  ++w.clock();
}

bool Machine::arrive_named(Warp& w, int pc, uint32_t id, uint32_t threads, bool any) {
  if (id >= 16 || threads == 0 || threads % kLanes) fail(w, pc, "named barrier " + std::to_string(id));
  NamedBarrier& b = w.cta->named[id];
  if (b.arrived == 0) {
    b.expected = int(threads);
    b.any = false;
    b.knowledge = {};
  } else if (b.expected != int(threads)) {
    fail(w, pc, "named barrier " + std::to_string(id) + " is used with two counts");
  }
  b.arrived += kLanes;
  b.any = b.any || any;
  release(w, b.knowledge);
  if (b.arrived < b.expected) return false;
  b.arrived = 0;
  ++b.generation;
  b.last = b.knowledge;
  b.last_any = b.any;
  return true;
}

void Machine::complete_phase(Mbarrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    ++b.phase;
    b.pending = b.expected;
  }
}

void Machine::arrive(Warp& w, int pc, uint32_t address, int count) {
  auto const it = w.cta->barriers.find(address);
  if (it == w.cta->barriers.end() || !it->second.valid) fail(w, pc, "no mbarrier at " + std::to_string(address));
  Mbarrier& b = it->second;
  b.pending -= count;
  if (b.pending < 0) fail(w, pc, "more arrivals at an mbarrier than it expects");
  release(w, b.knowledge);
  complete_phase(b);
}

bool Machine::phase_done(Cta& cta, uint32_t address, uint32_t parity) const {
  auto const it = cta.barriers.find(address);
  return it != cta.barriers.end() && (it->second.phase & 1) != parity;
}

// ---- copies in flight
bool Machine::progress_async(Cta& cta, bool late_too) {
  std::vector<int> choices;  // warps with cp.async; -1: a tensor copy
  for (auto& w : cta.warps) {
    if (!w.copies.empty()) choices.push_back(w.index);
  }
  size_t copy = cta.tensor_copies.size();
  if (copy) {
    copy = random_() % copy;
    if (late_too || !cta.tensor_copies[copy].late || random_() % 2048 == 0) choices.push_back(-1);
  }
  if (choices.empty()) return false;
  int const chosen = choices[random_() % choices.size()];
  if (chosen < 0) {
    finish_tensor_copy(cta, copy);
  } else {
    finish_copy(cta.warps[chosen]);
  }
  return true;
}

void Machine::finish_copy(Warp& w) {
  CopyAsync const copy = w.copies.front();
  w.copies.pop_front();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(copy.mask >> lane & 1)) continue;
    if (copy.arrive) {
      arrive(w, copy.pc, copy.shared[lane], 1);
      continue;
    }
    check_write(w, copy.pc, copy.shared[lane], copy.bytes);
    uint8_t* const to = w.cta->shared.data() + copy.shared[lane];
    std::memset(to, 0, copy.bytes);
    if (copy.source_bytes[lane]) read_global(*w.cta, copy.global[lane], to, copy.source_bytes[lane]);
  }
}

void Machine::finish_tensor_copy(Cta& cta, size_t index) {
  TensorCopy const copy = cta.tensor_copies[index];
  cta.tensor_copies.erase(cta.tensor_copies.begin() + long(index));
  TensorMap const& m = copy.map;
  Warp& w = cta.warps[copy.warp];
  uint32_t total = m.element_bytes;
  for (int d = 0; d < m.rank; ++d) total *= m.box[d];
  uint32_t const inner = m.box[0] * m.element_bytes;
  uint32_t const rows = total / inner;
  bounds(w, copy.pc, copy.shared, total, 128);
  ++cta.async_clock;
  if (options_.check_races) {
    for (uint32_t word = copy.shared / 4; word < (copy.shared + total) / 4; ++word) {
      Word& s = cta.words[word];
      for (int n = 0; n < int(cta.warps.size()); ++n) {
        if (s.read[n] > copy.issued.seen.of[n]) {
          fail(w, copy.pc,
               "race: a tensor copy overwrites shared memory at " + std::to_string(word * 4) + " that warp " +
                   std::to_string(n) + " has read without telling the copy's issuer, last at " + where(s.pc));
        }
      }
      if (s.writer != ~0u) {
        Clock const& ordered = s.writer == kAsync ? copy.issued.seen : copy.issued.fenced;
        if (s.written > ordered.of[s.writer]) {
          fail(w, copy.pc,
               "race: a tensor copy overwrites shared memory at " + std::to_string(word * 4) +
                   " without an order, or a proxy fence, after the write of " +
                   (s.writer == kAsync ? "another copy" : "warp " + std::to_string(s.writer)));
        }
      }
      s.writer = kAsync;
      s.written = cta.async_clock;
      std::memset(s.read, 0, sizeof s.read);
    }
  }
  for (uint32_t row = 0; row < rows; ++row) {
    int64_t at[5] = {copy.at[0]};
    uint32_t rest = row;
    bool inside = true;
    uint64_t from = m.base;
    for (int d = 1; d < m.rank; ++d) {
      at[d] = int64_t(copy.at[d]) + rest % m.box[d];
      rest /= m.box[d];
      inside = inside && at[d] >= 0 && uint64_t(at[d]) < m.dims[d];
      from += uint64_t(at[d]) * m.strides[d - 1];
    }
    for (uint32_t byte = 0; byte < inner; ++byte) {
      uint32_t to = copy.shared + row * inner + byte;
      to ^= (to >> 7 & ((1u << m.swizzle) - 1)) << 4;
      int64_t const column = at[0] + byte / m.element_bytes;
      bool const there = inside && column >= 0 && uint64_t(column) < m.dims[0];
      uint64_t const source = from + uint64_t(at[0]) * m.element_bytes + byte;
      if (there && byte % 16 == 0 && !memory_.allowed(source, 16, false))
        fail(w, copy.pc, "tensor copy reads out of bounds");
      cta.shared[to] = there ? *reinterpret_cast<uint8_t const*>(source) : 0;
    }
  }
  auto const it = cta.barriers.find(copy.barrier);
  if (it == cta.barriers.end()) fail(w, copy.pc, "a tensor copy's barrier is none");
  Mbarrier& b = it->second;
  b.bytes -= total;
  b.knowledge.join(copy.issued);
  b.knowledge.seen.of[kAsync] = std::max(b.knowledge.seen.of[kAsync], cta.async_clock);
  complete_phase(b);
}

// ---- global memory
void Machine::read_global(Cta const& cta, uint64_t from, void* to, uint32_t bytes) const {
  std::memcpy(to, reinterpret_cast<void const*>(from), bytes);
  if (!cta.stores.size()) return;
  for (uint64_t word = from & ~3ull; word < from + bytes; word += 4) {
    uint32_t const* const found = cta.stores.find(word);
    if (!found) continue;
    uint64_t const begin = std::max(word, from), end = std::min(word + 4, from + bytes);
    std::memcpy(static_cast<uint8_t*>(to) + (begin - from), reinterpret_cast<uint8_t const*>(found) + (begin - word),
                end - begin);
  }
}

void Machine::write_global(Cta& cta, uint64_t to, void const* from, uint32_t bytes) {
  for (uint64_t word = to & ~3ull; word < to + bytes; word += 4) {
    uint64_t const begin = std::max(word, to), end = std::min(word + 4, to + bytes);
    uint32_t value;
    read_global(cta, word, &value, 4);
    std::memcpy(reinterpret_cast<uint8_t*>(&value) + (begin - word), static_cast<uint8_t const*>(from) + (begin - to),
                end - begin);
    if (end - begin == 4) {
      cta.stores.put(word, value);
    } else {  // narrower stores are seen at once
      std::memcpy(reinterpret_cast<void*>(begin), static_cast<uint8_t const*>(from) + (begin - to), end - begin);
      if (cta.stores.find(word)) cta.stores.put(word, value);
    }
  }
}

// ---- shared memory
void Machine::bounds(Warp const& w, int pc, uint32_t address, uint64_t bytes, uint32_t alignment) const {
  if (address % alignment || address + bytes > launch_.shared_bytes) {
    fail(w, pc,
         "shared memory at " + std::to_string(address) + ", " + std::to_string(bytes) +
             " bytes: misaligned or out of bounds");
  }
}

void Machine::check_read(Warp& w, int pc, uint32_t address, uint32_t bytes, bool async_proxy) {
  if (!options_.check_races) return;
  for (uint32_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
    Word& s = w.cta->words[word];
    if (s.writer != ~0u) {
      if (s.written > w.knowledge.seen.of[s.writer]) {
        fail(w, pc,
             "race: reads shared memory at " + std::to_string(word * 4) + " that " +
                 (s.writer == kAsync ? std::string("a tensor copy") : "warp " + std::to_string(s.writer)) +
                 " wrote, with no order between them");
      }
      if (async_proxy && s.writer != kAsync && s.written > w.knowledge.fenced.of[s.writer]) {
        fail(w, pc,
             "no proxy fence between the write of shared memory at " + std::to_string(word * 4) + " by warp " +
                 std::to_string(s.writer) + " and its read by the async proxy");
      }
    }
    s.read[w.index] = w.clock();
    s.pc = pc;
  }
}

void Machine::check_write(Warp& w, int pc, uint32_t address, uint32_t bytes) {
  if (!options_.check_races) return;
  for (uint32_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
    Word& s = w.cta->words[word];
    for (int n = 0; n < int(w.cta->warps.size()); ++n) {
      if (n != w.index && s.read[n] > w.knowledge.seen.of[n]) {
        fail(w, pc,
             "race: overwrites shared memory at " + std::to_string(word * 4) + " that warp " + std::to_string(n) +
                 " reads, with no order between them");
      }
    }
    if (s.writer != ~0u && s.writer != uint32_t(w.index) && s.written > w.knowledge.seen.of[s.writer]) {
      fail(w, pc,
           "race: overwrites shared memory at " + std::to_string(word * 4) + " that " +
               (s.writer == kAsync ? std::string("a tensor copy") : "warp " + std::to_string(s.writer)) +
               " wrote, with no order between them");
    }
    s.writer = uint32_t(w.index);
    s.written = w.clock();
    std::memset(s.read, 0, sizeof s.read);
  }
}

}  // namespace ptx
