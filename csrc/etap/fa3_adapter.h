// What the patched FlashAttention-3 includes in flash_api.cpp and flash_api_stable.cpp: mha_fwd's arguments, after its
// own checks, in the form that csrc/fa3/ judges and runs; and, before them, whether the cache may be ETAP's alone. Host
// C++ only; the tensor class is the including file's.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>

#include "fa3/call.h"
#include "flash.h"

#ifdef TORCH_STABLE_ONLY
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
// Declared by shim.h only under USE_CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#else
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContextLight.h>
#endif

namespace etap::fa3 {

#ifdef TORCH_STABLE_ONLY
using Tensor = torch::stable::Tensor;
#else
using Tensor = at::Tensor;
#endif

inline cudaStream_t current_stream(int device) {
#ifdef TORCH_STABLE_ONLY
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
    throw std::runtime_error("ETAP: cannot get the current CUDA stream");
  }
  return static_cast<cudaStream_t>(stream);
#else
  return at::cuda::getCurrentCUDAStream(device).stream();
#endif
}

// Strides of (batch, token, head, column), or of a ragged (token, head, column).
inline RowStrides row_strides(Tensor const& t) {
  return {t.dim() == 4 ? t.stride(0) : 0, t.stride(-3), t.stride(-2)};
}

// Upstream looks at qv and kv_batch_idx only after the place where ETAP is asked.
inline bool goes_with(Tensor const& qv, Tensor const& q, int64_t head_dim_v) {
  if (qv.dim() != q.dim() || qv.scalar_type() != q.scalar_type() || !qv.is_cuda()) return false;
  if (qv.get_device() != q.get_device()) return false;
  for (int64_t d = 0; d + 1 < q.dim(); ++d) {
    if (qv.size(d) != q.size(d)) return false;
  }
  return qv.size(q.dim() - 1) == head_dim_v && qv.stride(-1) == 1;
}

inline bool is_batch_index(Tensor const& t, Tensor const& q, int batch) {
  return t.scalar_type() == decltype(t.scalar_type())::Int && t.dim() == 1 && t.size(0) == batch && t.is_cuda() &&
         t.get_device() == q.get_device() && t.is_contiguous();
}

// An e4m3 cache beside a 16-bit query.
inline bool has_e4m3_cache(Tensor const& q, Tensor const& k, Tensor const& v) {
  using Type = decltype(q.scalar_type());
  Type const type = q.scalar_type();
  return (type == Type::BFloat16 || type == Type::Half) && k.scalar_type() == Type::Float8_e4m3fn &&
         v.scalar_type() == Type::Float8_e4m3fn;
}

// Whether mha_fwd, which refuses such a cache, is to put its check of dtypes off until try_run() has declined the call.
inline bool may_widen(Tensor const& q, Tensor const& k, Tensor const& v, std::optional<Tensor> const& qv) {
  return qv && has_e4m3_cache(q, k, v);
}

// mha_fwd's descales, (batch, KV heads).
struct Descales {
  std::optional<Tensor> const& q;
  std::optional<Tensor> const& k;
  std::optional<Tensor> const& v;
};

// Upstream's shape for the one KV head, or what the operator takes: one per request, or one for all.
inline bool is_descale(std::optional<Tensor> const& t, Tensor const& q, int batch) {
  if (!t) return true;
  bool const per_request = (t->dim() == 1 || (t->dim() == 2 && t->size(1) == 1)) && t->size(0) == batch;
  return t->scalar_type() == decltype(t->scalar_type())::Float && (per_request || t->numel() == 1) && t->is_cuda() &&
         t->get_device() == q.get_device();
}

inline void set_scale(std::optional<Tensor> const& t, float const** data, int64_t* stride) {
  if (!t) return;  // the value counts
  *data = static_cast<float const*>(t->data_ptr());
  *stride = t->numel() > 1 ? t->stride(0) : 0;
}

inline Call describe(Flash_fwd_params const& f, Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& qv,
                     std::optional<Tensor> const& kv_batch_idx, Descales const& descales, bool appends_kv) {
  Call call{};
  call.arch = f.arch;
  call.head_dim = f.d;
  call.head_dim_v = f.dv;
  call.kv_heads = f.h_k;
  call.attention_chunk = f.attention_chunk;
  call.total_q = f.total_q;
  call.total_k = f.total_k;
  call.softmax_scale = f.scale_softmax;
  call.softcap = f.softcap;
  call.is_e4m3 = f.is_e4m3;
  call.is_local = f.is_local;
  call.has_leftpad = f.leftpad_k != nullptr;
  call.appends_kv = appends_kv;
  call.has_cu_seqlens_k = f.cu_seqlens_k != nullptr;
  call.has_seqused_q = f.seqused_q != nullptr;
  call.qv_ok = goes_with(qv, q, f.dv);
  call.batch_idx_ok = !kv_batch_idx || is_batch_index(*kv_batch_idx, q, f.b);
  call.descales_ok = !descales.q && is_descale(descales.k, q, f.b) && is_descale(descales.v, q, f.b);
  call.is_bf16 = f.is_bf16;
  call.cache_is_e4m3 = has_e4m3_cache(q, k, v);
  call.num_sm = f.num_sm;

  bool const ragged = f.cu_seqlens_q != nullptr, paged = f.page_table != nullptr;
  MlaDecodeParams& p = call.params;
  p.batch = f.b;
  p.num_heads = f.h;
  p.q_len = f.seqlen_q;
  p.cu_seqlens_q = f.cu_seqlens_q;
  p.cache_seqlens = f.seqused_k;
  p.causal = f.is_causal && f.seqlen_q > 1;
  p.scale_log2 = static_cast<float>(f.scale_softmax * M_LOG2E);
  p.q_rope = f.q_ptr;
  p.q_rope_stride = {f.q_batch_stride, f.q_row_stride, f.q_head_stride};
  if (call.qv_ok) {
    p.q_nope = qv.data_ptr();
    p.q_nope_stride = row_strides(qv);
  }
  // Upstream's K is the rope part, its V the latent part.
  p.kpe = f.k_ptr;
  p.ckv = f.v_ptr;
  p.kpe_page_stride = f.k_batch_stride;
  p.kpe_row_stride = f.k_row_stride;
  p.ckv_page_stride = f.v_batch_stride;
  p.ckv_row_stride = f.v_row_stride;
  p.num_pages = paged ? f.num_pages : f.b_k;
  p.page_size = paged ? f.page_size : f.seqlen_k;
  p.capacity = f.seqlen_k;
  p.page_table = f.page_table;
  p.page_table_stride = f.page_table_batch_stride;
  p.max_pages = paged && f.page_size > 0 ? f.seqlen_k / f.page_size : 0;
  if (kv_batch_idx && call.batch_idx_ok) p.cache_batch_idx = static_cast<int const*>(kv_batch_idx->data_ptr());
  // Each descale goes with the tensor it is named after. The latent is V and most of K: v_descale is its scale in both.
  p.ckv_scale = p.kpe_scale = 1.0f;
  if (call.cache_is_e4m3 && call.descales_ok) {
    set_scale(descales.v, &p.ckv_scale_data, &p.ckv_scale_stride);
    set_scale(descales.k, &p.kpe_scale_data, &p.kpe_scale_stride);
  }
  p.out = f.o_ptr;
  p.out_stride = {f.o_batch_stride, f.o_row_stride, f.o_head_stride};
  p.lse = static_cast<float*>(f.softmax_lse_ptr);  // (batch, heads, tokens), or (heads, total_q)
  p.lse_stride = ragged ? RowStrides{0, 1, f.total_q} : RowStrides{int64_t(f.h) * f.seqlen_q, 1, f.seqlen_q};
  p.lse_unit = static_cast<float>(M_LN2);
  return call;
}

// True: output and LSE are enqueued on the current stream. False: nothing was done, and upstream's code goes on.
// num_splits does not matter: ETAP's partial results are merged inside the kernel, and every call is reproducible.
inline bool try_run(Flash_fwd_params const& params, Tensor const& q, Tensor const& k, Tensor const& v,
                    std::optional<Tensor> const& qv, std::optional<Tensor> const& kv_batch_idx,
                    Descales const& descales, bool appends_kv, int64_t /*num_splits*/) {
  if (!qv) {
    note_not_mla();
    return false;
  }
  Call const call = describe(params, q, k, v, *qv, kv_batch_idx, descales, appends_kv);
  if (!accept(call)) return false;
  int const device = q.get_device();
  launch(call, device, current_stream(device));
  return true;
}

}  // namespace etap::fa3
