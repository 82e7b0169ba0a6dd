// 16-bit and 8-bit floating point, as bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace ptx {

inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }

inline float bf16_to_float(uint16_t h) { return float_of(uint32_t(h) << 16); }
inline uint16_t float_to_bf16(float x) {
  uint32_t const b = bits_of(x);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
inline float f16_to_float(uint16_t h) { return float(std::bit_cast<_Float16>(h)); }
inline uint16_t float_to_f16(float x) { return std::isnan(x) ? 0x7fff : std::bit_cast<uint16_t>(_Float16(x)); }

inline uint16_t e4m3_to_f16(uint8_t v) {
  int const exponent = v >> 3 & 15, mantissa = v & 7;
  float x = exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10);
  if ((v & 0x7f) == 0x7f) return 0x7fff;
  if (v & 0x80) x = -x;
  return std::bit_cast<uint16_t>(_Float16(x));
}

}  // namespace ptx
