// A PTX module as the interpreter runs it: kernels, their registers, and instructions with resolved operands.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;

enum class Type : uint8_t {
  None,
  U8,
  S8,
  U16,
  S16,
  U32,
  S32,
  U64,
  S64,
  F16,
  BF16,
  F32,
  F64,
  F16x2,
  BF16x2,
  U16x2,
  S16x2,
  E4M3x2,
  Pred
};

int bytes_of(Type type);
inline bool is_signed(Type t) { return t == Type::S8 || t == Type::S16 || t == Type::S32 || t == Type::S64; }
inline bool is_float(Type t) { return t >= Type::F16 && t <= Type::BF16x2; }

struct Operand {
  enum Kind : uint8_t { Sink, Reg32, Reg64, RegPred, Immediate, Vector, Address, Label } kind = Sink;
  bool negated = false;                                   // of a predicate
  int reg = -1;                                           // register, or that of an address (-1: none)
  bool reg_is_64 = false;                                 // of an address
  uint64_t value = 0;                                     // immediate, address offset, label
  std::shared_ptr<std::array<uint32_t, kLanes>> lanes32;  // an immediate, for every lane
  std::shared_ptr<std::array<uint64_t, kLanes>> lanes64;
  std::vector<Operand> parts;  // of a vector, or the coordinates of a tensor address
};

// What an instruction does; its modifiers are in `words`, its types in `types`.
enum class Op : uint8_t {
  Abs,
  Add,
  And,
  Atom,
  Bar,
  BarWarp,
  Bfe,
  Bfi,
  Bfind,
  Bra,
  Brev,
  Clz,
  CpAsync,
  CpAsyncBulk,
  CpAsyncArrive,
  CpAsyncCommit,
  CpAsyncWait,
  Cvt,
  Cvta,
  Div,
  Elect,
  Ex2,
  Exit,
  Fence,
  FenceProxy,
  Fma,
  Ld,
  Ldmatrix,
  Lg2,
  Lop3,
  Mad,
  Max,
  Mbarrier,
  Min,
  Mov,
  Mul,
  Nanosleep,
  Neg,
  Nop,
  Not,
  Or,
  Popc,
  Prmt,
  Rcp,
  Redux,
  Rem,
  Selp,
  Setp,
  Shf,
  Shfl,
  Shl,
  Shr,
  Sqrt,
  St,
  Stmatrix,
  Sub,
  Trap,
  Vote,
  WgmmaCommit,
  WgmmaFence,
  WgmmaMma,
  WgmmaWait,
  Xor
};

struct Instruction {
  Op op = Op::Nop;
  std::array<Type, 3> types{};     // as written, in order
  std::vector<std::string> words;  // the opcode, cut at the dots
  std::vector<Operand> args;
  int guard = -1;  // predicate register
  bool guard_negated = false;
  int line = 0;   // of the module's text
  int mode = 0;   // what the operation makes of its modifiers
  int count = 0;  // vector width, or N of wgmma

  bool has(std::string_view word) const {
    for (auto const& w : words) {
      if (w == word) return true;
    }
    return false;
  }
};

struct Parameter {
  int bytes, offset;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> params;
  int param_bytes = 0;
  std::vector<Instruction> code;
  int num_reg32 = 0, num_reg64 = 0, num_preds = 0;
  // registers that hold what a special register says
  struct Special {
    std::string name;
    int reg;
    bool is_64;
  };
  std::vector<Special> specials;
};

struct Module {
  std::string text;
  std::vector<size_t> line_starts;
  std::vector<Kernel> kernels;

  std::string line(int number) const;
};

// Throws std::runtime_error, naming the line, for what the interpreter does not know.
std::shared_ptr<Module> parse(std::string text);

}  // namespace ptx
