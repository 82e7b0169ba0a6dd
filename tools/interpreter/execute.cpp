// Instructions other than the tensor core's.
#include <algorithm>
#include <bit>
#include <cmath>

#include "machine.h"
#include "numbers.h"

namespace ptx {

#define EACH_LANE(lane)                     \
  for (int lane = 0; lane < kLanes; ++lane) \
    if (mask >> lane & 1)

// ---- operands
uint32_t const* Machine::lanes32(Warp const& w, Operand const& o) const {
  if (o.kind == Operand::Reg32) return w.reg32.data() + size_t(o.reg) * kLanes;
  if (o.kind == Operand::Immediate) return o.lanes32->data();
  throw Error("a 32-bit operand is something else");
}
uint64_t const* Machine::lanes64(Warp const& w, Operand const& o) const {
  if (o.kind == Operand::Reg64) return w.reg64.data() + size_t(o.reg) * kLanes;
  if (o.kind == Operand::Immediate) return o.lanes64->data();
  throw Error("a 64-bit operand is something else");
}
uint64_t Machine::lane(Warp const& w, Operand const& o, int lane) const {
  switch (o.kind) {
    case Operand::Reg32:
      return w.reg32[size_t(o.reg) * kLanes + lane];
    case Operand::Reg64:
      return w.reg64[size_t(o.reg) * kLanes + lane];
    case Operand::RegPred:
      return (w.preds[o.reg] >> lane & 1) != uint32_t(o.negated);
    case Operand::Immediate:
      return o.value;
    default:
      throw Error("no value in an operand");
  }
}
uint32_t Machine::pred(Warp const& w, Operand const& o) const {
  if (o.kind == Operand::Immediate) return o.value ? ~0u : 0u;
  return o.negated ? ~w.preds[o.reg] : w.preds[o.reg];
}
void Machine::set_pred(Warp& w, Operand const& o, uint32_t bits, uint32_t mask) {
  if (o.kind == Operand::Sink) return;
  w.preds[o.reg] = (w.preds[o.reg] & ~mask) | (bits & mask);
}
uint64_t Machine::address(Warp const& w, Operand const& o, int lane) const {
  if (o.kind != Operand::Address) return this->lane(w, o, lane);
  uint64_t base = 0;
  if (o.reg >= 0) base = o.reg_is_64 ? w.reg64[size_t(o.reg) * kLanes + lane] : w.reg32[size_t(o.reg) * kLanes + lane];
  return base + o.value;
}

// Writes to the lanes of an operand.
struct Lanes {
  Warp& w;
  Operand const& to;
  void set(int lane, uint64_t value) const {
    if (to.kind == Operand::Reg32)
      w.reg32[size_t(to.reg) * kLanes + lane] = uint32_t(value);
    else if (to.kind == Operand::Reg64)
      w.reg64[size_t(to.reg) * kLanes + lane] = value;
    else if (to.kind != Operand::Sink)
      throw Error("result is no register");
  }
};

namespace {

template <class F>
uint32_t on_halves(uint32_t a, uint32_t b, F&& f) {
  return uint32_t(f(uint16_t(a), uint16_t(b))) | uint32_t(f(uint16_t(a >> 16), uint16_t(b >> 16))) << 16;
}

float widen(Type t, uint16_t h) { return t == Type::BF16 || t == Type::BF16x2 ? bf16_to_float(h) : f16_to_float(h); }
uint16_t narrow(Type t, float x) { return t == Type::BF16 || t == Type::BF16x2 ? float_to_bf16(x) : float_to_f16(x); }

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

template <class T>
T bigger(T a, T b) {
  return std::isnan(a) ? b : std::isnan(b) ? a : std::max(a, b);
}
template <class T>
T smaller(T a, T b) {
  return std::isnan(a) ? b : std::isnan(b) ? a : std::min(a, b);
}

float float_op(Op op, float a, float b) {
  switch (op) {
    case Op::Add:
      return a + b;
    case Op::Sub:
      return a - b;
    case Op::Mul:
      return a * b;
    case Op::Div:
      return a / b;
    case Op::Max:
      return bigger(a, b);
    case Op::Min:
      return smaller(a, b);
    case Op::Neg:
      return -a;
    case Op::Abs:
      return std::fabs(a);
    case Op::Ex2:
      return std::exp2(a);
    case Op::Lg2:
      return std::log2(a);
    case Op::Rcp:
      return 1.0f / a;
    case Op::Sqrt:
      return std::sqrt(a);
    default:
      throw Error("floating-point operation");
  }
}

template <class U, class S>
U integer_op(Op op, bool is_signed, U a, U b) {
  int constexpr bits = sizeof(U) * 8;
  switch (op) {
    case Op::Add:
      return a + b;
    case Op::Sub:
      return a - b;
    case Op::And:
      return a & b;
    case Op::Or:
      return a | b;
    case Op::Xor:
      return a ^ b;
    case Op::Not:
      return ~a;
    case Op::Neg:
      return U(0) - a;
    case Op::Abs:
      return S(a) < 0 ? U(0) - a : a;
    case Op::Max:
      return is_signed ? U(std::max(S(a), S(b))) : std::max(a, b);
    case Op::Min:
      return is_signed ? U(std::min(S(a), S(b))) : std::min(a, b);
    case Op::Div:
      return b == 0 ? ~U(0) : is_signed ? (b == ~U(0) ? U(0) - a : U(S(a) / S(b))) : a / b;
    case Op::Rem:
      return b == 0 ? a : is_signed ? (b == ~U(0) ? U(0) : U(S(a) % S(b))) : a % b;
    default:
      break;
  }
  uint32_t const by = uint32_t(b);
  if (op == Op::Shl) return by >= uint32_t(bits) ? U(0) : U(a << by);
  if (op == Op::Shr)
    return is_signed ? U(S(a) >> std::min<uint32_t>(by, bits - 1)) : by >= uint32_t(bits) ? U(0) : U(a >> by);
  throw Error("integer operation");
}

template <class T>
bool compare_ordered(int mode, T a, T b) {  // of integers, or of floats of which none is NaN
  switch (mode) {
    case 0:
      return a == b;
    case 1:
      return a != b;
    case 2:
      return a < b;
    case 3:
      return a <= b;
    case 4:
      return a > b;
    default:
      return a >= b;
  }
}
bool compare(int mode, double a, double b) {  // of floats: modes 6 and up are true where one is NaN, but 12, num
  bool const unordered = std::isnan(a) || std::isnan(b);
  if (mode >= 12) return unordered != (mode == 12);
  return unordered ? mode >= 6 : compare_ordered(mode % 6, a, b);
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t const bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int n = 0; n < 4; ++n) {
    uint32_t const s = selector >> 4 * n & 15;
    uint8_t v = uint8_t(bytes >> 8 * (s & 7));
    if (s & 8) v = v & 0x80 ? 0xff : 0;
    result |= uint32_t(v) << 8 * n;
  }
  return result;
}

uint64_t extended(Type t, uint64_t raw) {
  switch (t) {
    case Type::S8:
      return uint64_t(int64_t(int8_t(raw)));
    case Type::S16:
      return uint64_t(int64_t(int16_t(raw)));
    case Type::S32:
      return uint64_t(int64_t(int32_t(raw)));
    case Type::U8:
      return uint8_t(raw);
    case Type::U16:
      return uint16_t(raw);
    case Type::U32:
      return uint32_t(raw);
    default:
      return raw;
  }
}

}  // namespace

void Machine::arithmetic(Warp& w, Instruction const& i, uint32_t mask) {
  Type const t = i.types[0];
  Lanes const to{w, i.args[0]};
  auto arg = [&](int n) -> Operand const& { return i.args[n]; };
  bool const unary = i.args.size() == 2;
  bool const ftz = i.has("ftz");
  if (t == Type::Pred) {
    uint32_t const a = pred(w, arg(1)), b = unary ? 0 : pred(w, arg(2));
    set_pred(w, arg(0), i.op == Op::And ? a & b : i.op == Op::Or ? a | b : i.op == Op::Xor ? a ^ b : ~a, mask);
    return;
  }
  if (i.op == Op::Fma || (i.op == Op::Mad && is_float(t))) {
    EACH_LANE(l) {
      uint64_t const a = lane(w, arg(1), l), b = lane(w, arg(2), l), c = lane(w, arg(3), l);
      if (t == Type::F32) {
        to.set(l, bits_of(std::fma(float_of(uint32_t(a)), float_of(uint32_t(b)), float_of(uint32_t(c)))));
      } else if (t == Type::F64) {
        to.set(l, std::bit_cast<uint64_t>(
                      std::fma(std::bit_cast<double>(a), std::bit_cast<double>(b), std::bit_cast<double>(c))));
      } else {
        uint32_t result = 0;
        for (int half = 0; half < (bytes_of(t) == 4 ? 2 : 1); ++half) {
          auto value = [&](uint64_t x) { return double(widen(t, uint16_t(x >> 16 * half))); };
          result |= uint32_t(narrow(t, float(value(a) * value(b) + value(c)))) << 16 * half;
        }
        to.set(l, result);
      }
    }
    return;
  }
  if (i.op == Op::Mul && !is_float(t)) {
    EACH_LANE(l) {
      uint64_t const a = lane(w, arg(1), l), b = lane(w, arg(2), l);
      if (bytes_of(t) == 8) {
        __int128 const p = is_signed(t) ? __int128(int64_t(a)) * int64_t(b) : __int128((unsigned __int128)a * b);
        to.set(l, i.mode == 1 ? uint64_t(p >> 64) : uint64_t(p));
      } else {
        int const bits = bytes_of(t) * 8;
        int64_t const p = int64_t(extended(t, a)) * int64_t(extended(t, b));
        to.set(l, i.mode == 1 ? uint64_t(p) >> bits : i.mode == 2 ? uint64_t(p) : uint64_t(p) & (~0ull >> (64 - bits)));
      }
    }
    return;
  }
  if (i.op == Op::Mad) {
    EACH_LANE(l) {
      uint64_t const a = lane(w, arg(1), l), b = lane(w, arg(2), l), c = lane(w, arg(3), l);
      if (bytes_of(t) == 8) {
        to.set(l, a * b + c);
      } else {
        int64_t const p = int64_t(extended(t, a)) * int64_t(extended(t, b));
        to.set(l, i.mode == 1 ? (uint64_t(p) >> bytes_of(t) * 8) + c : uint64_t(p) + c);
      }
    }
    return;
  }
  if (t == Type::F32) {
    EACH_LANE(l) {
      float a = float_of(uint32_t(lane(w, arg(1), l))), b = unary ? 0 : float_of(uint32_t(lane(w, arg(2), l)));
      if (ftz) a = flushed(a), b = flushed(b);
      float const r = float_op(i.op, a, b);
      to.set(l, bits_of(ftz ? flushed(r) : r));
    }
    return;
  }
  if (is_float(t) && t != Type::F64) {
    EACH_LANE(l) {
      uint32_t const a = uint32_t(lane(w, arg(1), l)), b = unary ? 0 : uint32_t(lane(w, arg(2), l));
      auto const f = [&](uint16_t x, uint16_t y) { return narrow(t, float_op(i.op, widen(t, x), widen(t, y))); };
      to.set(l, bytes_of(t) == 4 ? on_halves(a, b, f) : f(uint16_t(a), uint16_t(b)));
    }
    return;
  }
  if (t == Type::U16x2 || t == Type::S16x2) {
    EACH_LANE(l) {
      to.set(l, on_halves(uint32_t(lane(w, arg(1), l)), uint32_t(lane(w, arg(2), l)), [&](uint16_t x, uint16_t y) {
               return integer_op<uint16_t, int16_t>(i.op, t == Type::S16x2, x, y);
             }));
    }
    return;
  }
  if (t == Type::F64) throw Error("double precision");
  EACH_LANE(l) {
    uint64_t const a = lane(w, arg(1), l), b = unary ? 0 : lane(w, arg(2), l);
    uint64_t r;
    switch (bytes_of(t)) {
      case 2:
        r = integer_op<uint16_t, int16_t>(i.op, is_signed(t), uint16_t(a), uint16_t(b));
        break;
      case 4:
        r = integer_op<uint32_t, int32_t>(i.op, is_signed(t), uint32_t(a), uint32_t(b));
        break;
      default:
        r = integer_op<uint64_t, int64_t>(i.op, is_signed(t), a, b);
        break;
    }
    to.set(l, r);
  }
}

void Machine::convert(Warp& w, Instruction const& i, uint32_t mask) {
  Type const d = i.types[0], s = i.types[1];
  Lanes const to{w, i.args[0]};
  EACH_LANE(l) {
    uint64_t const a = lane(w, i.args[1], l);
    if (d == Type::F16x2 && s == Type::E4M3x2) {
      to.set(l, uint32_t(e4m3_to_f16(uint8_t(a))) | uint32_t(e4m3_to_f16(uint8_t(a >> 8))) << 16);
    } else if (bytes_of(d) == 4 && (d == Type::F16x2 || d == Type::BF16x2)) {
      uint64_t const b = lane(w, i.args[2], l);  // the first source is the upper half
      to.set(l, uint32_t(narrow(d, float_of(uint32_t(a)))) << 16 | narrow(d, float_of(uint32_t(b))));
    } else if (d == Type::F16 || d == Type::BF16) {
      float const x = s == Type::F32 ? float_of(uint32_t(a))
                      : is_float(s)  ? widen(s, uint16_t(a))
                      : is_signed(s) ? float(int64_t(extended(s, a)))
                                     : float(extended(s, a));
      to.set(l, narrow(d, x));
    } else if (d == Type::F32) {
      float const x = s == Type::F32                      ? float_of(uint32_t(a))
                      : s == Type::F16 || s == Type::BF16 ? widen(s, uint16_t(a))
                      : is_signed(s)                      ? float(int64_t(extended(s, a)))
                                                          : float(extended(s, a));
      float r = x;
      if (s == Type::F32)
        r = i.has("rni")   ? std::nearbyint(x)
            : i.has("rmi") ? std::floor(x)
            : i.has("rpi") ? std::ceil(x)
            : i.has("rzi") ? std::trunc(x)
                           : x;
      to.set(l, bits_of(r));
    } else if (s == Type::F32) {  // to an integer, saturating
      double x = float_of(uint32_t(a));
      x = i.has("rni") ? std::nearbyint(x) : i.has("rmi") ? std::floor(x) : i.has("rpi") ? std::ceil(x) : std::trunc(x);
      if (std::isnan(x)) x = 0;
      int const bits = bytes_of(d) * 8;
      double const low = is_signed(d) ? -std::ldexp(1.0, bits - 1) : 0.0;
      double const high = is_signed(d) ? std::ldexp(1.0, bits - 1) - 1 : std::ldexp(1.0, bits) - 1;
      if (bits == 64 && x >= high)
        to.set(l, is_signed(d) ? uint64_t(INT64_MAX) : ~0ull);
      else
        to.set(l, is_signed(d) ? uint64_t(int64_t(std::clamp(x, low, high))) : uint64_t(std::clamp(x, low, high)));
    } else if (is_float(s) || is_float(d)) {
      throw Error("conversion");
    } else {
      to.set(l, extended(d, extended(s, a)));
    }
  }
}

// ---- memory
void Machine::load(Warp& w, int pc, Instruction const& i, uint32_t mask) {
  Type const t = i.types[0];
  int const bytes = bytes_of(t), count = std::max(1, i.count);
  Operand const& to = i.args[0];
  EACH_LANE(l) {
    uint64_t at = address(w, i.args[1], l);
    bool const in_window = i.mode == 0 && at >= kSharedWindow && at < kSharedWindow + (1ull << 32);
    uint8_t const* from;
    uint8_t global[16];
    if (i.mode == 1 || in_window) {
      uint32_t const offset = uint32_t(at);
      bounds(w, pc, offset, uint64_t(bytes) * count, bytes * count);
      check_read(w, pc, offset, bytes * count, false);
      from = w.cta->shared.data() + offset;
    } else {
      uint64_t const begin = uint64_t(launch_.params.data());
      bool const param = at >= begin && at + bytes * count <= begin + launch_.params.size();
      if (!param && !memory_.allowed(at, uint64_t(bytes) * count, false))
        fail(w, pc, "reads global memory out of bounds");
      if (at % (bytes * count)) fail(w, pc, "misaligned read of global memory");
      read_global(*w.cta, at, global, uint32_t(bytes * count));
      from = global;
    }
    for (int n = 0; n < count; ++n) {
      uint64_t raw = 0;
      std::memcpy(&raw, from + n * bytes, bytes);
      Lanes{w, to.kind == Operand::Vector ? to.parts[n] : to}.set(l, extended(t, raw));
    }
  }
}

void Machine::store(Warp& w, int pc, Instruction const& i, uint32_t mask) {
  int const bytes = bytes_of(i.types[0]), count = std::max(1, i.count);
  Operand const& from = i.args[1];
  EACH_LANE(l) {
    uint64_t const at = address(w, i.args[0], l);
    bool const in_window = i.mode == 0 && at >= kSharedWindow && at < kSharedWindow + (1ull << 32);
    uint8_t* to;
    uint8_t global[16];
    bool const shared = i.mode == 1 || in_window;
    if (shared) {
      uint32_t const offset = uint32_t(at);
      bounds(w, pc, offset, uint64_t(bytes) * count, bytes * count);
      check_write(w, pc, offset, bytes * count);
      to = w.cta->shared.data() + offset;
    } else {
      if (!memory_.allowed(at, uint64_t(bytes) * count, true)) fail(w, pc, "writes global memory out of bounds");
      if (at % (bytes * count)) fail(w, pc, "misaligned write of global memory");
      to = global;
    }
    for (int n = 0; n < count; ++n) {
      uint64_t const raw = lane(w, from.kind == Operand::Vector ? from.parts[n] : from, l);
      std::memcpy(to + n * bytes, &raw, bytes);
    }
    if (!shared) write_global(*w.cta, at, global, uint32_t(bytes * count));
  }
}

void Machine::atomic(Warp& w, int pc, Instruction const& i, uint32_t mask) {
  bool const red = i.words[0] == "red";
  Operand const& place = i.args[red ? 0 : 1];
  Type const t = i.types[0];
  bool const shared = i.mode == 1;
  auto const bytes = uint32_t(bytes_of(t));
  EACH_LANE(l) {
    uint64_t const at = address(w, place, l), operand = lane(w, i.args[red ? 1 : 2], l);
    void* memory = reinterpret_cast<void*>(at);
    if (shared) {
      bounds(w, pc, uint32_t(at), bytes, bytes);
      check_read(w, pc, uint32_t(at), bytes, false);
      check_write(w, pc, uint32_t(at), bytes);
      memory = w.cta->shared.data() + at;
    } else {
      if (!memory_.allowed(at, bytes, true)) fail(w, pc, "atomic operation out of bounds");
      if (w.cta->stores.find(at)) w.cta->stores.drain_all();
    }
    uint64_t old = 0, made;
    std::memcpy(&old, memory, bytes);
    if (i.has("add"))
      made = old + operand;
    else if (i.has("exch"))
      made = operand;
    else if (i.has("or"))
      made = old | operand;
    else if (i.has("max"))
      made = is_signed(t) ? uint64_t(std::max(int32_t(old), int32_t(operand))) : std::max(old, operand);
    else if (i.has("cas"))
      made = old == operand ? lane(w, i.args[3], l) : old;
    else {
      fail(w, pc, "atomic operation");
    }
    std::memcpy(memory, &made, bytes);
    if (!red) Lanes{w, i.args[0]}.set(l, old);
  }
}

// ---- lanes among each other
void Machine::shuffle(Warp& w, Instruction const& i, uint32_t mask) {
  Operand const& to = i.args[0];
  bool const has_pred = i.args.size() == 6;
  size_t const n = has_pred ? 2 : 1;
  uint32_t const* value = lanes32(w, i.args[n]);
  uint32_t copy[kLanes], valid = 0;
  std::copy(value, value + kLanes, copy);
  EACH_LANE(l) {
    uint32_t const b = uint32_t(lane(w, i.args[n + 1], l)), c = uint32_t(lane(w, i.args[n + 2], l));
    uint32_t const segment = c >> 8 & 31, clamp = c & 31;
    int const highest = int((uint32_t(l) & segment) | (clamp & ~segment)), lowest = int(uint32_t(l) & segment);
    int from;
    bool inside;
    switch (i.mode) {
      case 1:
        from = l - int(b & 31), inside = from >= highest;
        break;
      case 2:
        from = l + int(b & 31), inside = from <= highest;
        break;
      case 3:
        from = l ^ int(b & 31), inside = from <= highest;
        break;
      default:
        from = lowest | int(b & 31 & ~segment), inside = from <= highest;
        break;
    }
    if (!inside) from = l;
    if (inside) valid |= 1u << l;
    Lanes{w, to}.set(l, copy[from & 31]);
  }
  if (has_pred) set_pred(w, i.args[1], valid, mask);
}

Machine::Next Machine::execute(Warp& w, Group& g, Instruction const& i, uint32_t mask) {
  Cta& cta = *w.cta;
  int const pc = g.pc;
  auto whole = [&] { return aligned_mask(w, g, ~0u); };
  switch (i.op) {
    case Op::Nop:
      return Next::Continue;
    case Op::Fence:
      cta.stores.drain_all();
      return Next::Continue;
    case Op::Trap:
      fail(w, pc, "trap");
    case Op::Nanosleep:
      return Next::Yield;
    case Op::Mov: {
      Type const t = i.types[0];
      Operand const &to = i.args[0], &from = i.args[1];
      if (t == Type::Pred) {
        set_pred(w, to, pred(w, from), mask);
      } else if (to.kind == Operand::Vector) {  // unpack
        int const bits = bytes_of(t) * 8 / int(to.parts.size());
        EACH_LANE(l) {
          uint64_t const v = lane(w, from, l);
          for (size_t n = 0; n < to.parts.size(); ++n)
            Lanes{w, to.parts[n]}.set(l, v >> bits * n & (~0ull >> (64 - bits)));
        }
      } else if (from.kind == Operand::Vector) {  // pack
        int const bits = bytes_of(t) * 8 / int(from.parts.size());
        EACH_LANE(l) {
          uint64_t v = 0;
          for (size_t n = 0; n < from.parts.size(); ++n)
            v |= (lane(w, from.parts[n], l) & (~0ull >> (64 - bits))) << bits * n;
          Lanes{w, to}.set(l, v);
        }
      } else {
        EACH_LANE(l) Lanes{w, to}.set(l, lane(w, from, l));
      }
      return Next::Continue;
    }
    case Op::Selp: {
      uint32_t const p = pred(w, i.args[3]);
      EACH_LANE(l) Lanes{w, i.args[0]}.set(l, lane(w, i.args[p >> l & 1 ? 1 : 2], l));
      return Next::Continue;
    }
    case Op::Setp: {
      Type const t = i.types[0];
      bool const two = i.args.size() >= 4 && i.args[1].kind == Operand::RegPred && i.args[3].kind != Operand::RegPred;
      size_t const n = two ? 2 : 1;
      uint32_t bits = 0;
      EACH_LANE(l) {
        uint64_t const a = lane(w, i.args[n], l), b = lane(w, i.args[n + 1], l);
        bool r;
        if (t == Type::F32)
          r = compare(i.mode, float_of(uint32_t(a)), float_of(uint32_t(b)));
        else if (is_float(t))
          r = compare(i.mode, widen(t, uint16_t(a)), widen(t, uint16_t(b)));
        else if (is_signed(t))
          r = compare_ordered(i.mode, int64_t(extended(t, a)), int64_t(extended(t, b)));
        else
          r = compare_ordered(i.mode, extended(t, a), extended(t, b));
        bits |= uint32_t(r) << l;
      }
      uint32_t other = ~bits;
      if (i.args.size() > n + 2) {
        uint32_t const c = pred(w, i.args[n + 2]);
        if (i.has("and"))
          bits &= c, other &= c;
        else if (i.has("or"))
          bits |= c, other |= c;
        else
          bits ^= c, other ^= c;
      }
      set_pred(w, i.args[0], bits, mask);
      if (two) set_pred(w, i.args[1], other, mask);
      return Next::Continue;
    }
    case Op::Cvt:
      convert(w, i, mask);
      return Next::Continue;
    case Op::Cvta: {
      bool const shared = i.has("shared") || i.has("shared::cta"), to_space = i.has("to");
      EACH_LANE(l) {
        uint64_t v = lane(w, i.args[1], l);
        if (shared) v = to_space ? uint32_t(v) : kSharedWindow + uint32_t(v);
        Lanes{w, i.args[0]}.set(l, v);
      }
      return Next::Continue;
    }
    case Op::Ld:
      load(w, pc, i, mask);
      return i.has("volatile") || i.has("relaxed") || i.has("acquire") ? (random_() % 4 ? Next::Continue : Next::Yield)
                                                                       : Next::Continue;
    case Op::St:
      store(w, pc, i, mask);
      return Next::Continue;
    case Op::Atom:
      atomic(w, pc, i, mask);
      return Next::Continue;
    case Op::Prmt:
      EACH_LANE(l)
      Lanes{w, i.args[0]}.set(l, permute(uint32_t(lane(w, i.args[1], l)), uint32_t(lane(w, i.args[2], l)),
                                         uint32_t(lane(w, i.args[3], l))));
      return Next::Continue;
    case Op::Bfi:
      EACH_LANE(l) {
        uint32_t const a = uint32_t(lane(w, i.args[1], l)), b = uint32_t(lane(w, i.args[2], l));
        uint32_t const at = lane(w, i.args[3], l) & 255, length = lane(w, i.args[4], l) & 255;
        uint64_t const field = (length >= 32 ? ~0ull : (1ull << length) - 1) << at;
        Lanes{w, i.args[0]}.set(l, uint32_t((b & ~field) | ((uint64_t(a) << at) & field)));
      }
      return Next::Continue;
    case Op::Bfe:
      EACH_LANE(l) {
        uint64_t const a = lane(w, i.args[1], l), at = lane(w, i.args[2], l) & 255,
                       length = lane(w, i.args[3], l) & 255;
        if (is_signed(i.types[0])) throw Error("signed bfe");
        Lanes{w, i.args[0]}.set(l, at > 63 ? 0 : (a >> at) & (length >= 64 ? ~0ull : (1ull << length) - 1));
      }
      return Next::Continue;
    case Op::Bfind:
      EACH_LANE(l) {
        uint32_t const a = uint32_t(lane(w, i.args[1], l));
        int const top = a ? 31 - __builtin_clz(a) : -1;
        Lanes{w, i.args[0]}.set(l, uint32_t(a && i.has("shiftamt") ? 31 - top : top));
      }
      return Next::Continue;
    case Op::Brev:
      EACH_LANE(l) {
        uint32_t v = uint32_t(lane(w, i.args[1], l)), r = 0;
        for (int n = 0; n < 32; ++n) r |= (v >> n & 1) << (31 - n);
        Lanes{w, i.args[0]}.set(l, r);
      }
      return Next::Continue;
    case Op::Clz:
      EACH_LANE(l) {
        uint32_t const a = uint32_t(lane(w, i.args[1], l));
        Lanes{w, i.args[0]}.set(l, a ? __builtin_clz(a) : 32);
      }
      return Next::Continue;
    case Op::Popc:
      EACH_LANE(l) Lanes{w, i.args[0]}.set(l, std::popcount(lane(w, i.args[1], l)));
      return Next::Continue;
    case Op::Lop3:
      EACH_LANE(l) {
        uint32_t const a = uint32_t(lane(w, i.args[1], l)), b = uint32_t(lane(w, i.args[2], l)),
                       c = uint32_t(lane(w, i.args[3], l));
        uint32_t const table = uint32_t(i.args[4].value);
        uint32_t r = 0;
        for (int n = 0; n < 8; ++n) {
          if (table >> n & 1) r |= (n & 4 ? a : ~a) & (n & 2 ? b : ~b) & (n & 1 ? c : ~c);
        }
        Lanes{w, i.args[0]}.set(l, r);
      }
      return Next::Continue;
    case Op::Shf:
      EACH_LANE(l) {
        uint64_t const v = lane(w, i.args[2], l) << 32 | uint32_t(lane(w, i.args[1], l));
        uint32_t n = uint32_t(lane(w, i.args[3], l));
        n = i.has("wrap") ? n & 31 : std::min(n, 32u);
        Lanes{w, i.args[0]}.set(l, i.has("l") ? uint32_t(v << n >> 32) : uint32_t(v >> n));
      }
      return Next::Continue;
    case Op::Shfl:
      if (!aligned_mask(w, g, uint32_t(lane(w, i.args.back(), first(mask))))) return Next::Blocked;
      shuffle(w, i, mask);
      return Next::Continue;
    case Op::Vote: {
      if (!aligned_mask(w, g, uint32_t(lane(w, i.args[2], first(mask))))) return Next::Blocked;
      uint32_t const members = uint32_t(lane(w, i.args[2], first(mask))) & w.alive(),
                     bits = pred(w, i.args[1]) & members;
      if (i.has("ballot")) {
        EACH_LANE(l) Lanes{w, i.args[0]}.set(l, bits);
      } else {
        set_pred(w, i.args[0], (i.has("any") ? bits != 0 : bits == members) ? ~0u : 0u, mask);
      }
      return Next::Continue;
    }
    case Op::Redux: {
      uint32_t const members = uint32_t(lane(w, i.args[2], first(mask)));
      if (!aligned_mask(w, g, members)) return Next::Blocked;
      uint32_t const* v = lanes32(w, i.args[1]);
      uint32_t total = v[first(members)];
      for (int l = first(members) + 1; l < kLanes; ++l) {
        if (!(members >> l & 1)) continue;
        Op const op = i.has("add")   ? Op::Add
                      : i.has("max") ? Op::Max
                      : i.has("min") ? Op::Min
                      : i.has("and") ? Op::And
                      : i.has("or")  ? Op::Or
                                     : Op::Xor;
        total = integer_op<uint32_t, int32_t>(op, is_signed(i.types[0]), total, v[l]);
      }
      EACH_LANE(l) Lanes{w, i.args[0]}.set(l, total);
      return Next::Continue;
    }
    case Op::Elect: {
      uint32_t const members = uint32_t(lane(w, i.args[2], first(mask)));
      if (!aligned_mask(w, g, members)) return Next::Blocked;
      EACH_LANE(l) Lanes{w, i.args[0]}.set(l, first(members));
      set_pred(w, i.args[1], 1u << first(members), mask);
      return Next::Continue;
    }
    case Op::BarWarp:
      return aligned_mask(w, g, uint32_t(lane(w, i.args[0], first(mask)))) ? Next::Continue : Next::Blocked;
    case Op::Bar: {
      if (!whole()) return Next::Blocked;
      size_t const n = i.mode == 2 ? 1 : 0;
      uint32_t const id = uint32_t(lane(w, i.args[n], 0));
      uint32_t const threads = i.args.size() > n + 1 && i.args[n + 1].kind != Operand::RegPred
                                   ? uint32_t(lane(w, i.args[n + 1], 0))
                                   : launch_.block;
      if (id >= 16) fail(w, pc, "named barrier");
      NamedBarrier& b = cta.named[id];
      if (!g.arrived) {
        uint32_t const before = b.generation;
        bool const complete = arrive_named(w, pc, id, threads, i.mode == 2 && pred(w, i.args.back()) != 0);
        if (i.mode == 1) return Next::Continue;
        if (!complete) {
          g.arrived = true;
          g.block = Group::Named;
          g.where = id;
          g.until = before;
          return Next::Blocked;
        }
      }
      g.arrived = false;
      w.knowledge.join(b.last);
      if (i.mode == 2) set_pred(w, i.args[0], b.last_any ? ~0u : 0u, mask);
      return random_() % 2 ? Next::Continue : Next::Yield;
    }
    case Op::Mbarrier: {
      if (i.mode == 0) {
        EACH_LANE(l) {
          uint32_t const at = uint32_t(address(w, i.args[0], l));
          bounds(w, pc, at, 8, 8);
          Mbarrier& b = cta.barriers[at];
          b = {};
          b.expected = b.pending = int(lane(w, i.args[1], l));
          b.valid = true;
        }
        return Next::Continue;
      }
      if (i.mode == 4) {
        EACH_LANE(l) cta.barriers.erase(uint32_t(address(w, i.args[0], l)));
        return Next::Continue;
      }
      if (i.mode == 3) {
        uint32_t done = 0;
        EACH_LANE(l) {
          uint32_t const at = uint32_t(address(w, i.args[1], l)), parity = uint32_t(lane(w, i.args[2], l));
          if (!cta.barriers.count(at)) fail(w, pc, "waits for an mbarrier that was not initialised");
          g.where = at;
          g.until = parity;
          if (!phase_done(cta, at, parity)) continue;
          done |= 1u << l;
          w.knowledge.join(cta.barriers[at].knowledge);
        }
        if (!done && i.words[1] == "try_wait" && random_() % 16) {  // now and then it comes back empty-handed
          g.block = Group::Phase;
          return Next::Blocked;
        }
        set_pred(w, i.args[0], done, mask);  // lanes that wait for another phase go their own way
        return done ? Next::Continue : Next::Yield;
      }
      bool const has_state = i.args[0].kind != Operand::Address;  // mbarrier.arrive's token
      Operand const& place = i.args[has_state ? 1 : 0];
      size_t const n = has_state ? 2 : 1;
      EACH_LANE(l) {
        uint32_t const at = uint32_t(address(w, place, l));
        auto const it = cta.barriers.find(at);
        if (it == cta.barriers.end()) fail(w, pc, "no mbarrier");
        if (i.mode == 2 || i.mode == 5) it->second.bytes += int64_t(lane(w, i.args[n], l));
        if (i.mode == 1) arrive(w, pc, at, i.args.size() > n ? int(lane(w, i.args[n], l)) : 1);
        if (i.mode == 2) arrive(w, pc, at, 1);
      }
      return random_() % 2 ? Next::Continue : Next::Yield;
    }
    case Op::FenceProxy:
      w.knowledge.fenced.join(w.knowledge.seen);
      ++w.clock();
      return Next::Continue;
    case Op::CpAsync:
    case Op::CpAsyncArrive:
      issue_copy(w, pc, i, mask);
      return Next::Continue;
    case Op::CpAsyncCommit:
      return Next::Continue;
    case Op::CpAsyncWait:
      if (!i.has("wait_all") && i.args[0].value != 0) fail(w, pc, "waits for some copies");
      while (!w.copies.empty()) finish_copy(w);
      return Next::Continue;
    case Op::CpAsyncBulk:
      issue_tensor_copy(w, pc, i, mask);
      return random_() % 2 ? Next::Continue : Next::Yield;
    case Op::Ldmatrix:
      if (!whole()) return Next::Blocked;
      load_matrix(w, pc, i, mask);
      return Next::Continue;
    case Op::Stmatrix:
      if (!whole()) return Next::Blocked;
      store_matrix(w, pc, i, mask);
      return Next::Continue;
    case Op::WgmmaFence:
      return whole() ? Next::Continue : Next::Blocked;
    case Op::WgmmaMma:
      if (!whole()) return Next::Blocked;
      wgmma(w, pc, i);
      return Next::Continue;
    case Op::WgmmaCommit:
      if (!whole()) return Next::Blocked;
      w.wgmma.emplace_back();
      return Next::Continue;
    case Op::WgmmaWait:
      if (!whole()) return Next::Blocked;
      wgmma_wait(w, i);
      return random_() % 2 ? Next::Continue : Next::Yield;
    case Op::Abs:
    case Op::Add:
    case Op::And:
    case Op::Div:
    case Op::Ex2:
    case Op::Fma:
    case Op::Lg2:
    case Op::Mad:
    case Op::Max:
    case Op::Min:
    case Op::Mul:
    case Op::Neg:
    case Op::Not:
    case Op::Or:
    case Op::Rcp:
    case Op::Rem:
    case Op::Shl:
    case Op::Shr:
    case Op::Sqrt:
    case Op::Sub:
    case Op::Xor:
      arithmetic(w, i, mask);
      return Next::Continue;
    default:
      fail(w, pc, "instruction");
  }
}

void Machine::issue_copy(Warp& w, int pc, Instruction const& i, uint32_t mask) {
  CopyAsync copy;
  copy.mask = mask;
  copy.pc = pc;
  copy.arrive = i.op == Op::CpAsyncArrive;
  if (!copy.arrive) copy.bytes = uint32_t(i.args[2].value);
  EACH_LANE(l) {
    copy.shared[l] = uint32_t(address(w, i.args[0], l));
    if (copy.arrive) continue;
    copy.global[l] = address(w, i.args[1], l);
    copy.source_bytes[l] = i.args.size() > 3 && !i.has("L2::cache_hint") ? uint32_t(lane(w, i.args[3], l)) : copy.bytes;
    bounds(w, pc, copy.shared[l], copy.bytes, copy.bytes);
    if (copy.source_bytes[l] && !memory_.allowed(copy.global[l], copy.source_bytes[l], false))
      fail(w, pc, "cp.async reads out of bounds");
    if (copy.global[l] % copy.bytes) fail(w, pc, "cp.async reads a misaligned address");
  }
  w.copies.push_back(copy);
}

}  // namespace ptx
