// A call of FlashAttention-3's mha_fwd as ETAP sees it, and whether ETAP can run it. Host C++ only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "etap/config.h"
#include "etap/params.h"

namespace etap::fa3 {

// Why upstream runs a call, in the order of the checks.
enum class Reason {
  kTaken,
  kNotMla,
  kEmpty,
  kSwitchedOff,
  kGpu,
  kDtype,
  kHeadDims,
  kKvHeads,
  kRows,
  kChunk,
  kWindow,
  kSoftcap,
  kLeftpad,
  kAppend,
  kCuSeqlensK,
  kNoLengths,
  kSeqUsedQ,
  kQueryFormat,
  kBatchIdxFormat,
  kPagedBatchIdx,
  kScale,
  kDescale,
  kAlignment,
  kSmMargin,
  kSlower,
};

constexpr char const* kReasons[] = {
    "taken",
    "not MLA: no qv",
    "nothing to compute: no query or no key",
    "switched off",
    "GPU: not of compute capability 9.0",
    "dtype: queries neither bfloat16 nor float16",
    "head dimensions: not 64 (q, k) and 512 (qv, v)",
    "KV heads: more than one",
    "rows: heads x max_seqlen_q above the limit",
    "attention_chunk",
    "window_size",
    "softcap",
    "leftpad_k",
    "k_new or rotary_cos: keys to append or rotate",
    "cu_seqlens_k",
    "seqused_k (cache_seqlens): not given",
    "seqused_q",
    "qv: dtype, device, shape or stride does not go with q",
    "kv_batch_idx (cache_batch_idx): not batch contiguous int32 values on the GPU",
    "kv_batch_idx (cache_batch_idx) with page_table",
    "softmax_scale: not positive",
    "descale: q_descale beside 16-bit queries, or k_descale or v_descale not float32 (batch, 1) on the GPU",
    "q, qv or out: rows are not 16-byte aligned",
    "sm_margin: leaves no SM",
    "upstream is faster: more than 32 rows",
};
constexpr int kNumReasons = sizeof(kReasons) / sizeof(kReasons[0]);
static_assert(kNumReasons == static_cast<int>(Reason::kSlower) + 1);

struct Call {
  // what only the decision needs
  int arch, head_dim, head_dim_v, kv_heads, attention_chunk;
  int total_q, total_k;
  float softmax_scale, softcap;
  bool is_e4m3;  // the query
  bool is_local;
  bool has_leftpad, appends_kv, has_cu_seqlens_k, has_seqused_q;
  bool qv_ok;         // qv goes with q
  bool batch_idx_ok;  // there is none, or it is well formed
  bool descales_ok;   // of an e4m3 cache: none of the query's, and the cache's are well formed or not given

  bool is_bf16;
  bool cache_is_e4m3;      // beside a 16-bit query: upstream has no kernel for it
  int num_sm;              // after sm_margin
  MlaDecodeParams params;  // all but the workspace and what launch_mla_decode fills in
};

// Whether every row of a (batch, token, head, column) tensor of 16-bit elements begins at a multiple of 16 bytes.
inline bool rows_aligned(void const* data, RowStrides const& stride, MlaDecodeParams const& p, int total_q) {
  bool const ragged = p.cu_seqlens_q != nullptr;
  bool const one_token = (ragged ? total_q : p.q_len) <= 1;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (ragged || p.batch <= 1 || stride.batch % 8 == 0) &&
         (one_token || stride.token % 8 == 0) && (p.num_heads <= 1 || stride.head % 8 == 0);
}

// Measured: etap_integration/dispatch/decision.py has the same rule, with figures.
inline bool upstream_is_faster(Call const& c) {
  return !c.cache_is_e4m3 && int64_t(c.params.num_heads) * c.params.q_len > 32;
}

// kTaken if ETAP can run the call, else why not. max_rows: the most query rows (tokens x heads) per request.
inline Reason judge(Call const& c, int max_rows) {
  MlaDecodeParams const& p = c.params;
  // Upstream fills the output of calls without keys itself.
  if (c.total_q <= 0 || c.total_k <= 0 || p.batch <= 0 || p.num_heads <= 0 || p.q_len <= 0 || p.num_pages <= 0 ||
      p.page_size <= 0 || p.capacity <= 0) {
    return Reason::kEmpty;
  }
  if (c.arch != 90) return Reason::kGpu;
  if (c.is_e4m3) return Reason::kDtype;
  if (c.head_dim != kRopeDim || c.head_dim_v != kLatentDim) return Reason::kHeadDims;
  if (c.kv_heads != 1) return Reason::kKvHeads;
  if (int64_t(p.num_heads) * p.q_len > max_rows) return Reason::kRows;
  if (c.attention_chunk > 0) return Reason::kChunk;
  if (c.is_local) return Reason::kWindow;
  if (c.softcap != 0.0f) return Reason::kSoftcap;
  if (c.has_leftpad) return Reason::kLeftpad;
  if (c.appends_kv) return Reason::kAppend;
  if (c.has_cu_seqlens_k) return Reason::kCuSeqlensK;
  if (!p.cache_seqlens) return Reason::kNoLengths;
  if (c.has_seqused_q) return Reason::kSeqUsedQ;
  if (!c.qv_ok) return Reason::kQueryFormat;
  if (!c.batch_idx_ok) return Reason::kBatchIdxFormat;
  if (p.cache_batch_idx && p.page_table) return Reason::kPagedBatchIdx;
  if (!(c.softmax_scale > 0.0f)) return Reason::kScale;  // 0 or less would turn a mask's -inf into NaN or +inf
  if (c.cache_is_e4m3 && !c.descales_ok) return Reason::kDescale;
  if (!rows_aligned(p.q_nope, p.q_nope_stride, p, c.total_q) ||
      !rows_aligned(p.q_rope, p.q_rope_stride, p, c.total_q) || !rows_aligned(p.out, p.out_stride, p, c.total_q)) {
    return Reason::kAlignment;
  }
  if (c.num_sm <= 0) return Reason::kSmMargin;
  return Reason::kTaken;
}

// Defined in adapter_sm90.cu.

// Counts a call without qv; nothing else is done with it.
void note_not_mla();
// Whether ETAP takes the call, as the switch, judge() and, for "auto", upstream_is_faster() say; counts the reason.
// Throws std::runtime_error where the switch is "always" and ETAP cannot run the call, or where ETAP_FA3 has a value
// that means nothing.
bool accept(Call const& call);
// Enqueues an accepted call. Throws std::runtime_error if CUDA reports an error.
void launch(Call const& call, int device, cudaStream_t stream);

}  // namespace etap::fa3
