// wgmma, matrix loads and stores, and TMA.
#include <cstring>

#include "machine.h"
#include "numbers.h"

namespace ptx {
namespace {

// Where a wgmma operand in shared memory lies: a descriptor's fields, in bytes.
struct MatrixDescriptor {
  uint32_t start, stride;
  int swizzle_bits;

  explicit MatrixDescriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3fff) << 4), stride(uint32_t(bits >> 32 & 0x3fff) << 4) {
    static constexpr int kBits[4] = {0, 3, 2, 1};
    swizzle_bits = kBits[bits >> 62];
  }
  uint32_t swizzled(uint32_t address) const { return address ^ (address >> 7 & ((1u << swizzle_bits) - 1)) << 4; }
  // Byte address of 16-bit element k of row `row`, K-major; or of element `row` of row k, MN-major.
  uint32_t k_major(uint32_t row, uint32_t k) const {
    return swizzled(start + row / 8 * stride + row % 8 * 128 + 2 * k);
  }
  uint32_t mn_major(uint32_t row, uint32_t k) const { return swizzled(start + k / 8 * stride + k % 8 * 128 + 2 * row); }
};

uint64_t mixed(uint64_t hash, uint64_t v) { return (hash ^ v) * 0x9e3779b97f4a7c15ull + (hash >> 29); }

}  // namespace

uint64_t Machine::hash(Cta const& cta, InFlight const& f) const {
  uint64_t h = 1;
  for (auto const& [address, bytes] : f.ranges) {
    for (uint32_t n = 0; n < bytes; n += 8) {
      uint64_t v;
      std::memcpy(&v, cta.shared.data() + address + n, 8);
      h = mixed(h, v);
    }
  }
  return h;
}

// This warp's 16 rows of D = A B + D. Done at once; that its operands do not change before it has been waited for is
// checked there.
void Machine::wgmma(Warp& w, int pc, Instruction const& i) {
  Type const type = i.types[1];
  if (i.types[0] != Type::F32 || (type != Type::F16 && type != Type::BF16)) fail(w, pc, "types of a wgmma");
  int const n_rows = i.count, slice = w.index % 4 * 16;
  bool const from_registers = i.args[1].kind == Operand::Vector;
  auto const value = [&](uint16_t h) { return type == Type::BF16 ? bf16_to_float(h) : f16_to_float(h); };
  size_t const flags = 3;  // predicate; then the signs of A and B, and which are MN-major
  auto const flag = [&](size_t n) { return i.args.size() > n ? i.args[n].value : 0; };
  if (flag(flags + 1) != 1 || flag(flags + 2) != 1) fail(w, pc, "sign of a wgmma operand");
  bool const a_mn = !from_registers && flag(flags + 3), b_mn = flag(flags + (from_registers ? 3 : 4));
  if (b_mn) fail(w, pc, "an MN-major B");

  float a[16][16], b[256][16];
  InFlight reads;
  reads.pc = pc;
  auto const read_row = [&](uint32_t address) {  // 16-byte piece of an operand
    bounds(w, pc, address, 16, 16);
    check_read(w, pc, address, 16, true);
    reads.ranges.push_back({address, 16});
    return reinterpret_cast<uint16_t const*>(w.cta->shared.data() + address);
  };
  if (from_registers) {
    for (int r = 0; r < 4; ++r) {
      uint32_t const* lanes = lanes32(w, i.args[1].parts[r]);
      for (int l = 0; l < kLanes; ++l) {
        int const row = l / 4 + r % 2 * 8, k = 2 * (l % 4) + r / 2 * 8;
        a[row][k] = value(uint16_t(lanes[l]));
        a[row][k + 1] = value(uint16_t(lanes[l] >> 16));
      }
    }
  } else {
    MatrixDescriptor const d(lane(w, i.args[1], 0));
    for (int outer = 0; outer < 16; ++outer) {
      for (int piece = 0; piece < 2; ++piece) {
        uint16_t const* from =
            read_row(a_mn ? d.mn_major(slice + 8 * piece, outer) : d.k_major(slice + outer, 8 * piece));
        for (int e = 0; e < 8; ++e) {
          (a_mn ? a[8 * piece + e][outer] : a[outer][8 * piece + e]) = value(from[e]);
        }
      }
    }
  }
  MatrixDescriptor const d(lane(w, i.args[2], 0));
  for (int row = 0; row < n_rows; ++row) {
    for (int piece = 0; piece < 2; ++piece) {
      uint16_t const* from = read_row(d.k_major(row, 8 * piece));
      for (int e = 0; e < 8; ++e) b[row][8 * piece + e] = value(from[e]);
    }
  }
  bool const add = pred(w, i.args[flags]) & 1;
  for (int r = 0; r < n_rows / 2; ++r) {
    uint32_t* const to = w.reg32.data() + size_t(i.args[0].parts[r].reg) * kLanes;
    for (int l = 0; l < kLanes; ++l) {
      int const row = l / 4 + r / 2 % 2 * 8, column = r / 4 * 8 + 2 * (l % 4) + r % 2;
      double sum = add ? float_of(to[l]) : 0.0;
      for (int k = 0; k < 16; ++k) sum += double(a[row][k]) * b[column][k];
      to[l] = bits_of(float(sum));
    }
  }
  reads.hash = hash(*w.cta, reads);
  w.wgmma.back().push_back(std::move(reads));
}

void Machine::wgmma_wait(Warp& w, Instruction const& i) {
  size_t const pending = i.args[0].value;  // groups that need not be complete
  while (w.wgmma.size() - 1 > pending) {
    for (auto const& f : w.wgmma.front()) {
      if (hash(*w.cta, f) != f.hash) fail(w, f.pc, "an operand changes while the wgmma is in flight");
      if (options_.check_races) {
        for (auto const& [address, bytes] : f.ranges) {
          for (uint32_t word = address / 4; word < (address + bytes) / 4; ++word) {
            w.cta->words[word].read[w.index] = w.clock();
            w.cta->words[word].pc = f.pc;
          }
        }
      }
    }
    w.wgmma.erase(w.wgmma.begin());
  }
}

void Machine::load_matrix(Warp& w, int pc, Instruction const& i, uint32_t mask) {
  auto const& to = i.args[0];
  int const count = int(to.parts.size());
  bool const transposed = i.has("trans");
  uint16_t m[4][8][8];
  for (int j = 0; j < count; ++j) {
    for (int row = 0; row < 8; ++row) {
      uint32_t const at = uint32_t(address(w, i.args[1], 8 * j + row));
      bounds(w, pc, at, 16, 16);
      check_read(w, pc, at, 16, false);
      std::memcpy(m[j][row], w.cta->shared.data() + at, 16);
    }
  }
  for (int j = 0; j < count; ++j) {
    uint32_t* const reg = w.reg32.data() + size_t(to.parts[j].reg) * kLanes;
    for (int l = 0; l < kLanes; ++l) {
      int const r = l / 4, c = 2 * (l % 4);
      reg[l] = transposed ? uint32_t(m[j][c][r]) | uint32_t(m[j][c + 1][r]) << 16
                          : uint32_t(m[j][r][c]) | uint32_t(m[j][r][c + 1]) << 16;
    }
  }
}

void Machine::store_matrix(Warp& w, int pc, Instruction const& i, uint32_t mask) {
  auto const& from = i.args[1];
  int const count = int(from.parts.size());
  bool const transposed = i.has("trans");
  for (int j = 0; j < count; ++j) {
    uint16_t m[8][8];
    uint32_t const* reg = lanes32(w, from.parts[j]);
    for (int l = 0; l < kLanes; ++l) {
      int const r = l / 4, c = 2 * (l % 4);
      (transposed ? m[c][r] : m[r][c]) = uint16_t(reg[l]);
      (transposed ? m[c + 1][r] : m[r][c + 1]) = uint16_t(reg[l] >> 16);
    }
    for (int row = 0; row < 8; ++row) {
      uint32_t const at = uint32_t(address(w, i.args[0], 8 * j + row));
      bounds(w, pc, at, 16, 16);
      check_write(w, pc, at, 16);
      std::memcpy(w.cta->shared.data() + at, m[row], 16);
    }
  }
}

void Machine::issue_tensor_copy(Warp& w, int pc, Instruction const& i, uint32_t mask) {
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    Operand const& source = i.args[1];
    TensorCopy copy;
    std::memcpy(&copy.map, reinterpret_cast<void const*>(address(w, source, l)), sizeof copy.map);
    if (copy.map.magic != TensorMap::kMagic) fail(w, pc, "no tensor map where a tensor copy looks for one");
    auto const& coordinates = source.parts.at(0).parts;
    if (coordinates.size() != copy.map.rank) fail(w, pc, "coordinates of a tensor copy");
    for (size_t d = 0; d < coordinates.size(); ++d) copy.at[d] = int32_t(lane(w, coordinates[d], l));
    copy.shared = uint32_t(address(w, i.args[0], l));
    copy.barrier = uint32_t(address(w, i.args[2], l));
    copy.issued = w.knowledge;
    copy.warp = w.index;
    copy.pc = pc;
    copy.late = late_copies_ && random_() % late_copies_ == 0;
    if (copy.shared % 128) fail(w, pc, "a tensor copy to a misaligned address");
    w.cta->tensor_copies.push_back(copy);
  }
}

}  // namespace ptx
