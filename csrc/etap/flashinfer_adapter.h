// What the patched FlashInfer includes in batch_mla_sm90_plan.cu and batch_mla_sm90_run.cu: the arguments of run(), and
// the requests that plan() was given, in the form that csrc/flashinfer/ judges and runs. Host C++ only; the tensor
// class is the including file's.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "flashinfer/call.h"

namespace etap::flashinfer {

// ---- plan(): the requests, as int32 arrays behind upstream's work list in the int workspace, and where they lie, in
// entries behind upstream's in plan_info. Their place does not depend on the batch's contents, so a CUDA graph that was
// captured with one plan finds the requests of the next one there.

constexpr int64_t kPlanMark = 0x45544150;  // the last entry, where there are any of ours
constexpr int kPlanEntries = 4;            // offset in bytes, batch, longest query, kPlanMark

struct Requests {
  int64_t offset = -1;  // of qo_indptr [batch + 1], kv_indptr [batch], kv_len [batch]; below 0: not there
  int64_t batch = 0, longest = 0;
};

inline size_t request_bytes(int64_t batch) { return size_t(3 * batch + 1) * sizeof(int32_t); }

// Adds the requests to a plan and to the pinned copy of the int workspace, of which upstream uses the first `used`
// bytes. Returns the bytes in use now; where the requests do not fit, that is `used`, and the plan is as before.
template <class IdType>
size_t append_requests(std::vector<int64_t>& plan, size_t used, void* pinned, size_t workspace_bytes,
                       IdType const* qo_indptr, IdType const* kv_indptr, IdType const* kv_len, int64_t batch) {
  size_t const offset = (used + 15) / 16 * 16, end = offset + request_bytes(batch);
  if (sizeof(IdType) != sizeof(int32_t) || batch <= 0 || end > workspace_bytes) return used;
  int32_t* to = reinterpret_cast<int32_t*>(static_cast<char*>(pinned) + offset);
  int64_t longest = 0;
  for (int64_t i = 0; i < batch; ++i) longest = std::max<int64_t>(longest, qo_indptr[i + 1] - qo_indptr[i]);
  to = std::copy(qo_indptr, qo_indptr + batch + 1, to);
  to = std::copy(kv_indptr, kv_indptr + batch, to);
  std::copy(kv_len, kv_len + batch, to);
  plan.insert(plan.end(), {int64_t(offset), batch, longest, kPlanMark});
  return end;
}

// The same for releases whose planner copies to the device itself and does not say how much: everything behind its last
// array, which has kMaxWorks entries as all of its work list's do. Enqueues the copy of what was added.
template <class IdType>
cudaError_t append_and_copy_requests(std::vector<int64_t>& plan, int64_t last_offset, void* workspace, void* pinned,
                                     size_t workspace_bytes, IdType const* qo_indptr, IdType const* kv_indptr,
                                     IdType const* kv_len, int64_t batch, cudaStream_t stream) {
  constexpr size_t kMaxWorks = 16384;
  size_t const used = last_offset + kMaxWorks * sizeof(IdType);
  size_t const end = append_requests(plan, used, pinned, workspace_bytes, qo_indptr, kv_indptr, kv_len, batch);
  if (end == used) return cudaSuccess;
  return cudaMemcpyAsync(static_cast<char*>(workspace) + used, static_cast<char*>(pinned) + used, end - used,
                         cudaMemcpyHostToDevice, stream);
}

// Takes our entries off a plan, so that upstream finds its own.
inline Requests take_requests(std::vector<int64_t>& plan) {
  if (plan.size() <= kPlanEntries || plan.back() != kPlanMark) return {};
  int64_t const* const ours = plan.data() + plan.size() - kPlanEntries;
  Requests const requests{ours[0], ours[1], ours[2]};
  plan.resize(plan.size() - kPlanEntries);
  return requests;
}

// ---- run()

template <class Tensor>
Element element_of(Tensor const& t) {
  auto const type = t.dtype();  // DLPack's: code 0 int, 2 float, 4 bfloat, 10 float8_e4m3fn
  if (type.lanes != 1) return Element::kOther;
  if (type.code == 4 && type.bits == 16) return Element::kBf16;
  if (type.code == 2 && type.bits == 16) return Element::kFp16;
  if (type.code == 10 && type.bits == 8) return Element::kE4m3;
  if (type.code == 0 && type.bits == 32) return Element::kInt32;
  return Element::kOther;
}

template <class Tensor>
RowStrides ragged_strides(Tensor const& t) {  // of (token, head, column)
  return {0, t.stride(0), t.stride(1)};
}

template <class Tensor>
bool columns_contiguous(Tensor const& t) {
  return t.size(2) <= 1 || t.stride(2) == 1;
}

template <class Tensor>
Call describe(Requests const& requests, void const* int_workspace, Tensor const& q_nope, Tensor const& q_pe,
              Tensor const& ckv, Tensor const& kpe, Tensor const& kv_indices, Tensor const& o, float* lse,
              int64_t mask_mode, int64_t num_heads, int64_t page_size, double sm_scale, bool base_e, double ckv_scale,
              double kpe_scale, bool scales_per_token, int64_t num_sm) {
  Call call{};
#ifdef FLASHINFER_ENABLE_PROFILER
  call.profiles = true;
#endif
  call.planned = requests.offset >= 0;
  call.q = element_of(q_nope), call.q_pe = element_of(q_pe), call.out = element_of(o);
  call.ckv = element_of(ckv), call.kpe = element_of(kpe), call.index = element_of(kv_indices);
  call.total_q = q_nope.size(0);
  call.mask_mode = mask_mode;
  call.sm_scale = sm_scale;
  call.scales_per_token = scales_per_token;
  call.num_sm = num_sm;
  MlaDecodeParams& p = call.params;
  p.num_heads = static_cast<int>(num_heads);
  if (q_nope.ndim() != 3 || q_pe.ndim() != 3 || o.ndim() != 3 || ckv.ndim() != 3 || kpe.ndim() != 3) return call;
  call.head_dim_ckv = q_nope.size(2), call.head_dim_kpe = q_pe.size(2);
  call.shapes_ok = q_nope.size(1) == num_heads && ckv.size(0) == kpe.size(0) && ckv.size(1) == page_size &&
                   kpe.size(1) == page_size && ckv.size(2) == q_nope.size(2) && kpe.size(2) == q_pe.size(2);
  call.columns_ok = columns_contiguous(q_nope) && columns_contiguous(q_pe) && columns_contiguous(ckv) &&
                    columns_contiguous(kpe) && columns_contiguous(o);
  auto const* const arrays = reinterpret_cast<int const*>(static_cast<char const*>(int_workspace) + requests.offset);
  p.batch = static_cast<int>(requests.batch);
  p.q_len = static_cast<int>(requests.longest);
  if (call.planned) {
    p.cu_seqlens_q = arrays;
    p.page_indptr = arrays + requests.batch + 1;
    p.cache_seqlens = p.page_indptr + requests.batch;
  }
  // Not left out for single tokens: a CUDA graph keeps it, and its next plan may have longer queries.
  p.causal = mask_mode == kMaskCausal;
  p.scale_log2 = static_cast<float>(sm_scale * M_LOG2E);
  p.q_nope = q_nope.data_ptr();
  p.q_rope = q_pe.data_ptr();
  p.q_nope_stride = ragged_strides(q_nope);
  p.q_rope_stride = ragged_strides(q_pe);
  p.ckv = ckv.data_ptr();
  p.kpe = kpe.data_ptr();
  p.ckv_page_stride = ckv.stride(0), p.ckv_row_stride = ckv.stride(1);
  p.kpe_page_stride = kpe.stride(0), p.kpe_row_stride = kpe.stride(1);
  p.num_pages = static_cast<int>(ckv.size(0));
  p.page_size = static_cast<int>(page_size);
  p.page_table = static_cast<int const*>(kv_indices.data_ptr());
  constexpr int64_t kMax = std::numeric_limits<int>::max();
  p.max_pages = static_cast<int>(std::min<int64_t>(kv_indices.size(0), kMax));
  p.capacity = static_cast<int>(std::min<int64_t>(p.max_pages * std::max<int64_t>(page_size, 0), kMax));
  p.ckv_scale = static_cast<float>(ckv_scale);
  p.kpe_scale = static_cast<float>(kpe_scale);
  p.out = o.data_ptr();
  p.out_stride = ragged_strides(o);
  p.lse = lse;  // (token, head), contiguous
  p.lse_stride = {0, num_heads, 1};
  p.lse_unit = base_e ? static_cast<float>(M_LN2) : 1.0f;
  return call;
}

// True: output and LSE are enqueued on the stream. False: nothing was done, and upstream's code goes on.
template <class Tensor, class OptionalTensor>
bool try_run(Requests const& requests, void const* int_workspace, Tensor const& q_nope, Tensor const& q_pe,
             Tensor const& ckv, Tensor const& kpe, Tensor const& kv_indices, Tensor const& o,
             OptionalTensor const& lse, int64_t mask_mode, int64_t num_heads, int64_t page_size, double sm_scale,
             bool base_e, double ckv_scale, double kpe_scale, bool scales_per_token, int64_t num_sm,
             cudaStream_t stream) {
  float* const lse_data = lse.has_value() ? static_cast<float*>(lse.value().data_ptr()) : nullptr;
  Call const call = describe(requests, int_workspace, q_nope, q_pe, ckv, kpe, kv_indices, o, lse_data, mask_mode,
                             num_heads, page_size, sm_scale, base_e, ckv_scale, kpe_scale, scales_per_token, num_sm);
  if (!accept(call)) return false;
  launch(call, q_nope.device().device_id, stream);
  return true;
}

}  // namespace etap::flashinfer
