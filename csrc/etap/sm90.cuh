// Thin layer over CuTe's architecture wrappers: wgmma shapes and descriptors, named barriers, 16-bit packing, and
// the few PTX instructions that CuTe does not wrap.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <utility>

#include "config.h"
#include "params.h"

#define ETAP_DEVICE __device__ __forceinline__

namespace etap {

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;
using cutlass::arch::NamedBarrier;

// Named barriers (user ids of cutlass::arch::NamedBarrier; __syncthreads is apart).
enum Barrier : uint32_t {
  kBarrierGroup0 = 0,     // 128 threads of consumer warpgroup 0: its P^T is in shared memory; its statistics
  kBarrierGroup1 = 1,     // 128 threads of consumer warpgroup 1: likewise
  kBarrierInit = 3,       // 128 threads, for the warp that plans: barriers are initialised, the epoch is there
  kBarrierStart = 4,      // the other 352 threads: likewise
  kBarrierConsumers = 2,  // 256 threads: Q is in shared memory; O^T halves exchanged; steps of the merge. Wide: P^T
  kBarrierGiven0 = 5,     // wide. Warpgroup 0 arrives: it has given scores, and read the P^T before. 1 takes them
  kBarrierGiven1 = 6,     // the other way round
};

ETAP_DEVICE void sync_group(int group) { NamedBarrier::arrive_and_wait(128, kBarrierGroup0 + group); }
ETAP_DEVICE void sync_consumers() { NamedBarrier::arrive_and_wait(kConsumerThreads, kBarrierConsumers); }

// Has a value worked out by here, and what follows from it after: the compiler puts off to behind a wait what could be
// done before, and does at once what could be done meanwhile.
template <class Int>
ETAP_DEVICE void keep(Int& x) {
  asm volatile("" : "+r"(x));
}

// Barrier over `threads` threads that also returns the OR of a predicate.
ETAP_DEVICE bool sync_or(uint32_t barrier, uint32_t threads, bool value) {
  uint32_t result;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %3, 0;\nbar.red.or.pred q, %1, %2, p;\nselp.u32 %0, 1, 0, q;\n}"
      : "=r"(result)
      : "r"(barrier + NamedBarrier::ReservedNamedBarrierCount), "r"(threads), "r"(uint32_t(value))
      : "memory");
  return result != 0;
}

// ---- copies of cache rows
constexpr uint64_t kEvictNormal = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
constexpr uint64_t kEvictFirst = uint64_t(cute::TMA::CacheHintSm90::EVICT_FIRST);

// cp.async of 16 bytes to shared address `to`, as CuTe's, or with a hint, which costs instructions.
ETAP_DEVICE void copy_16b(uint32_t to, void const* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" : : "r"(to), "l"(from));
}
ETAP_DEVICE void copy_16b(uint32_t to, void const* from, uint64_t hint) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(from), "l"(hint));
}

// ---- wgmma. A is a 64-row tile, K- or MN-major in shared memory; B is K-major there.
using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

// WgmmaRegisters: A from registers, of the same type as B.
template <class T, int N, Major A>
struct Wgmma;
template <class T, int N>
struct WgmmaRegisters;
#define ETAP_WGMMA(T, N, NAME)                                                              \
  template <Major A>                                                                        \
  struct Wgmma<T, N, A> : cute::SM90::GMMA::MMA_64x##N##x16_F32##NAME##_SS<A, Major::K> {}; \
  template <>                                                                               \
  struct WgmmaRegisters<T, N> : cute::SM90::GMMA::MMA_64x##N##x16_F32##NAME##_RS<Major::K, Major::K> {};
ETAP_WGMMA(__nv_bfloat16, 8, BF16BF16)
ETAP_WGMMA(__nv_bfloat16, 16, BF16BF16)
ETAP_WGMMA(__nv_bfloat16, 32, BF16BF16)
ETAP_WGMMA(__nv_bfloat16, 64, BF16BF16)
ETAP_WGMMA(__half, 8, F16F16)
ETAP_WGMMA(__half, 16, F16F16)
ETAP_WGMMA(__half, 32, F16F16)
ETAP_WGMMA(__half, 64, F16F16)
#undef ETAP_WGMMA

template <class Atom, size_t R, size_t... I>
ETAP_DEVICE void wgmma_registers(uint64_t a, uint64_t b, float (&d)[R], ScaleOut scale, std::index_sequence<I...>) {
  Atom::fma(a, b, d[I]..., scale);
}

// d (64 x N, fp32 fragments) = or += A B
template <class T, int N, Major A>
ETAP_DEVICE void wgmma(uint64_t a, uint64_t b, float (&d)[N / 2], ScaleOut scale) {
  wgmma_registers<Wgmma<T, N, A>>(a, b, d, scale, std::make_index_sequence<N / 2>{});
}

using Group = uint32_t[4][4];  // A of four k16 steps: [step][register]

template <class Atom, size_t R, size_t... I>
ETAP_DEVICE void wgmma_registers(uint32_t const (&a)[4], uint64_t b, float (&d)[R], ScaleOut scale,
                                 std::index_sequence<I...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, d[I]..., scale);
}
template <class T, int N>
ETAP_DEVICE void wgmma(uint32_t const (&a)[4], uint64_t b, float (&d)[N / 2], ScaleOut scale) {
  wgmma_registers<WgmmaRegisters<T, N>>(a, b, d, scale, std::make_index_sequence<N / 2>{});
}

// Descriptor of a tile of 128-byte rows with the 128-byte swizzle, 8-row groups 1,024 bytes apart. The same fields
// serve K-major A and B (rows are M or N) and MN-major A (rows are K, one swizzle row spans M = 64). The low word is
// kept apart, in units of 16 bytes, so that a step to the next operand is one addition.
constexpr uint32_t kDescriptorUnit = 16;
ETAP_DEVICE uint32_t descriptor_low(uint32_t shared_address) { return shared_address / kDescriptorUnit | 1u << 16; }
ETAP_DEVICE uint64_t descriptor(uint32_t low) {
  constexpr uint32_t kStride = 1024 / kDescriptorUnit, kSwizzle128 = 1u << 30;
  return uint64_t(kStride | kSwizzle128) << 32 | low;
}

ETAP_DEVICE uint32_t shared_address(void const* p) { return cute::cast_smem_ptr_to_uint(p); }

// Byte offset of 16-byte column `col16` of row `row` in such a tile.
ETAP_DEVICE uint32_t swizzled(uint32_t row, uint32_t col16) { return row * 128 + ((col16 ^ (row & 7)) << 4); }

// ---- 16-bit pairs
ETAP_DEVICE uint32_t pack_pair(float lo, float hi, __nv_bfloat16) {
  __nv_bfloat162 const v = __floats2bfloat162_rn(lo, hi);
  return reinterpret_cast<uint32_t const&>(v);
}
ETAP_DEVICE uint32_t pack_pair(float lo, float hi, __half) {
  __half2 const v = __floats2half2_rn(lo, hi);
  return reinterpret_cast<uint32_t const&>(v);
}
ETAP_DEVICE float2 unpack_pair(uint32_t v, __nv_bfloat16) {
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}
ETAP_DEVICE float2 unpack_pair(uint32_t v, __half) { return __half22float2(reinterpret_cast<__half2 const&>(v)); }

// 2^x, flushing to zero; 2^-inf = 0
ETAP_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x), x > 0 and normal, within 2^-22: lg2.approx is that accurate only near 1, so the exponent goes apart.
ETAP_DEVICE float log2_accurate(float x) {
  int const bits = __float_as_int(x), exponent = (bits >> 23) - 127;
  float mantissa_log;
  asm("lg2.approx.f32 %0, %1;" : "=f"(mantissa_log) : "f"(__int_as_float(bits - (exponent << 23))));
  return float(exponent) + mantissa_log;
}

// stmatrix, transposed: four (or two) 8x8 fragments to rows of 16 bytes whose addresses the lanes give.
ETAP_DEVICE void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
ETAP_DEVICE void store_matrices(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b)
               : "memory");
}

// ldmatrix: four 8x8 fragments from the rows of 16 bytes whose addresses the lanes give.
template <size_t Size>
ETAP_DEVICE void load_matrices(uint32_t (&d)[Size], int at, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[at]), "=r"(d[at + 1]), "=r"(d[at + 2]), "=r"(d[at + 3])
               : "r"(address)
               : "memory");
}
template <size_t Size>
ETAP_DEVICE void load_matrices_transposed(uint32_t (&d)[Size], int at, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[at]), "=r"(d[at + 1]), "=r"(d[at + 2]), "=r"(d[at + 3])
               : "r"(address)
               : "memory");
}

// As EmptyBarrier::arrive, so many times at once.
template <int Times>
ETAP_DEVICE void arrive(EmptyBarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "n"(Times) : "memory");
}

ETAP_DEVICE void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// ---- words shared between CTAs of one launch. No order among them and the rest is asked for (no "memory" clobber: it
// would have shared memory read again and again).
ETAP_DEVICE void store_relaxed(float4* p, float4 v) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w));
}
ETAP_DEVICE void store_relaxed(float2* p, float2 v) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(v.x), "f"(v.y));
}
ETAP_DEVICE float4 load_relaxed(float4 const* p) {
  float4 v;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p));
  return v;
}
ETAP_DEVICE float2 load_relaxed(float2 const* p) {
  float2 v;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
  return v;
}
ETAP_DEVICE bool written(float x) { return __float_as_uint(x) != kUnwritten; }
ETAP_DEVICE bool written(float2 v) { return written(v.x) && written(v.y); }
ETAP_DEVICE bool written(float4 v) { return written(v.x) && written(v.y) && written(v.z) && written(v.w); }

// Hint only: brings the line that holds p to L2.
ETAP_DEVICE void prefetch_l2(void const* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

}  // namespace etap
