// A call of FlashInfer's BatchMLAPagedAttentionSM90Run as ETAP sees it, and whether ETAP can run it. Host C++ only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "etap/config.h"
#include "etap/params.h"

namespace etap::flashinfer {

// Why upstream runs a call, in the order of the checks.
enum class Reason {
  kTaken,
  kEmpty,
  kSwitchedOff,
  kProfiler,
  kDtype,
  kHeadDims,
  kRows,
  kMaskMode,
  kNoPlan,
  kIndexDtype,
  kShape,
  kColumns,
  kScale,
  kCacheScales,
  kAlignment,
  kNoSm,
};

constexpr char const* kReasons[] = {
    "taken",
    "nothing to compute: no query",
    "switched off",
    "profiler: the module was built to profile upstream's kernel",
    "dtype: query and output not bfloat16 or float16 alike, or the cache neither theirs nor e4m3",
    "head dimensions: not 512 (ckv) and 64 (kpe)",
    "rows: num_heads x the longest query above the limit",
    "mask mode: neither none nor causal",
    "plan: holds no requests (made by an unpatched module, or the int workspace is too small)",
    "kv_indices: not int32",
    "caches: not (pages, page_size, columns) alike, with the planned page size",
    "a tensor's last dimension is not contiguous",
    "sm_scale: not positive",
    "ckv_scale_arr: scales per token",
    "q_nope, q_pe or out: rows are not 16-byte aligned",
    "plan: no SM",
};
constexpr int kNumReasons = sizeof(kReasons) / sizeof(kReasons[0]);
static_assert(kNumReasons == static_cast<int>(Reason::kNoSm) + 1);

enum class Element { kOther, kBf16, kFp16, kE4m3, kInt32 };

struct Call {
  // what only the decision needs
  bool profiles, planned, shapes_ok, columns_ok, scales_per_token;
  Element q, q_pe, ckv, kpe, out, index;
  int64_t head_dim_ckv, head_dim_kpe, total_q;
  int64_t mask_mode;
  double sm_scale;

  int64_t num_sm;
  MlaDecodeParams params;  // all but the divisors and the workspace
};

constexpr int64_t kMaskNone = 0, kMaskCausal = 1;  // upstream's MaskMode

// Whether every row of a ragged (token, head, column) tensor of 16-bit elements begins at a multiple of 16 bytes.
inline bool rows_aligned(void const* data, RowStrides const& stride, int num_heads, int64_t total_q) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (total_q <= 1 || stride.token % 8 == 0) &&
         (num_heads <= 1 || stride.head % 8 == 0);
}

// kTaken if ETAP can run the call, else why not. max_rows: the most query rows (tokens x heads) per request.
inline Reason judge(Call const& c, int max_rows) {
  MlaDecodeParams const& p = c.params;
  if (c.total_q <= 0 || p.num_heads <= 0) return Reason::kEmpty;
  if (c.profiles) return Reason::kProfiler;
  if ((c.q != Element::kBf16 && c.q != Element::kFp16) || c.q_pe != c.q || c.out != c.q || c.kpe != c.ckv ||
      (c.ckv != c.q && c.ckv != Element::kE4m3)) {
    return Reason::kDtype;
  }
  if (c.head_dim_ckv != kLatentDim || c.head_dim_kpe != kRopeDim) return Reason::kHeadDims;
  if (c.mask_mode != kMaskNone && c.mask_mode != kMaskCausal) return Reason::kMaskMode;
  if (!c.planned) return Reason::kNoPlan;
  if (p.batch <= 0 || p.q_len <= 0) return Reason::kEmpty;
  if (int64_t(p.num_heads) * p.q_len > max_rows) return Reason::kRows;
  if (c.index != Element::kInt32) return Reason::kIndexDtype;
  if (!c.shapes_ok || p.num_pages <= 0 || p.page_size <= 0) return Reason::kShape;
  if (!c.columns_ok) return Reason::kColumns;
  if (!(c.sm_scale > 0.0)) return Reason::kScale;  // 0 or less would turn a mask's -inf into NaN or +inf
  if (c.scales_per_token) return Reason::kCacheScales;
  if (!rows_aligned(p.q_nope, p.q_nope_stride, p.num_heads, c.total_q) ||
      !rows_aligned(p.q_rope, p.q_rope_stride, p.num_heads, c.total_q) ||
      !rows_aligned(p.out, p.out_stride, p.num_heads, c.total_q)) {
    return Reason::kAlignment;
  }
  if (c.num_sm <= 0) return Reason::kNoSm;
  return Reason::kTaken;
}

// Defined in adapter.cu.

// Whether ETAP takes the call, as the switch and judge() say; counts the reason. Throws std::runtime_error where the
// switch is "always" and ETAP cannot run the call, or where ETAP_FLASHINFER has a value that means nothing.
bool accept(Call const& call);
// Enqueues an accepted call. Throws std::runtime_error if CUDA reports an error.
void launch(Call const& call, int device, cudaStream_t stream);

}  // namespace etap::flashinfer
