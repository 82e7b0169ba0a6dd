// FlashInfer's Hopper MLA kernel and its host-side plan behind plain C functions, unpatched.
//   KV_E4M3=1       e4m3 cache instead of bf16
//   PLANNED_SMS=n   the plan believes that the device has n SMs (0: as many as it has)
// The library holds one plan: call fi_plan for a problem, then fi_run for the same problem.
#include <flashinfer/attention/mla_hopper.cuh>
#include <flashinfer/attention/mla_params.cuh>
#include <flashinfer/attention/variant_helper.cuh>
#include <flashinfer/fastdiv.cuh>
#include <flashinfer/layout.cuh>
#include <flashinfer/math.cuh>
#include <flashinfer/page.cuh>
#include <flashinfer/pos_enc.cuh>
#include <flashinfer/utils.cuh>

#if PLANNED_SMS
#include "planned_sms.h"
#endif
#include <flashinfer/attention/scheduler.cuh>

namespace {

using flashinfer::MaskMode;

constexpr uint32_t kLatentDim = 512;
constexpr uint32_t kRopeDim = 64;

using Query = nv_bfloat16;
#if KV_E4M3
using Cache = __nv_fp8_e4m3;
#else
using Cache = nv_bfloat16;
#endif
using Params = flashinfer::MLAParams<Query, Cache, Query, int>;

flashinfer::MLAPlanInfo plan;

// Contiguous queries (tokens, heads, dim), caches (pages, page_size, dim) and outputs.
void set_strides(Params& params, uint32_t heads, uint32_t page_size) {
    params.q_nope_stride_n = params.o_stride_n = heads * kLatentDim;
    params.q_nope_stride_h = params.o_stride_h = kLatentDim;
    params.q_pe_stride_n = heads * kRopeDim;
    params.q_pe_stride_h = kRopeDim;
    params.ckv_stride_page = page_size * kLatentDim;
    params.ckv_stride_n = kLatentDim;
    params.kpe_stride_page = page_size * kRopeDim;
    params.kpe_stride_n = kRopeDim;
}

// Points the parameters at what the plan left in the two workspaces.
void set_plan(Params& params, void* float_workspace, void* int_workspace) {
    auto planned = [&](int64_t offset) { return flashinfer::GetPtrFromBaseOffset<int>(int_workspace, offset); };
    params.q_indptr = planned(plan.q_indptr_offset);
    params.kv_indptr = planned(plan.kv_indptr_offset);
    params.partial_indptr = planned(plan.partial_indptr_offset);
    params.q_len = planned(plan.q_len_offset);
    params.kv_len = planned(plan.kv_len_offset);
    params.q_start = planned(plan.q_start_offset);
    params.kv_start = planned(plan.kv_start_offset);
    params.kv_end = planned(plan.kv_end_offset);
    params.work_indptr = planned(plan.work_indptr_offset);
    params.merge_packed_offset_start = planned(plan.merge_packed_offset_start_offset);
    params.merge_packed_offset_end = planned(plan.merge_packed_offset_end_offset);
    params.merge_partial_packed_offset_start = planned(plan.merge_partial_packed_offset_start_offset);
    params.merge_partial_packed_offset_end = planned(plan.merge_partial_packed_offset_end_offset);
    params.merge_partial_stride = planned(plan.merge_partial_stride_offset);
    params.partial_o = flashinfer::GetPtrFromBaseOffset<Query>(float_workspace, plan.partial_o_offset);
    params.partial_lse = flashinfer::GetPtrFromBaseOffset<float>(float_workspace, plan.partial_lse_offset);
}

template <MaskMode kMask>
cudaError_t launch(Params params, cudaStream_t stream) {
    return flashinfer::mla::BatchMLAPageAttentionHopper<kMask, kLatentDim, kRopeDim>(params, plan.num_blks_x,
                                                                                    plan.num_blks_y, stream);
}

}  // namespace

// Plans the work split. `qo_indptr`, `kv_indptr` (in pages) and `kv_len` are host arrays of batch + 1, batch + 1 and
// batch ints; `host_workspace` is page-locked and as large as `int_workspace`.
extern "C" int fi_plan(void* float_workspace, size_t float_bytes, void* int_workspace, void* host_workspace,
                       size_t int_bytes, int* qo_indptr, int* kv_indptr, int* kv_len, int batch, int heads, int causal,
                       cudaStream_t stream) {
    size_t staged_bytes = 0;
    cudaError_t const error = flashinfer::MLAPlan<int>(float_workspace, float_bytes, int_workspace, host_workspace,
                                                       int_bytes, plan, staged_bytes, qo_indptr, kv_indptr, kv_len,
                                                       batch, heads, kLatentDim, causal, stream);
    if (error != cudaSuccess) {
        return static_cast<int>(error);
    }
    return static_cast<int>(
        cudaMemcpyAsync(int_workspace, host_workspace, staged_bytes, cudaMemcpyHostToDevice, stream));
}

// Runs the planned problem. `kv_indices` are page numbers, requests one after the other; `lse` (tokens, heads, natural
// log) may be null.
extern "C" int fi_run(void* float_workspace, void* int_workspace, void* q_nope, void* q_rope, void* ckv, void* kpe,
                      int* kv_indices, void* out, float* lse, int heads, int page_size, float softmax_scale, int causal,
                      cudaStream_t stream) {
    Params params;
    params.q_nope = static_cast<Query*>(q_nope);
    params.q_pe = static_cast<Query*>(q_rope);
    params.ckv = static_cast<Cache*>(ckv);
    params.kpe = static_cast<Cache*>(kpe);
    params.kv_indices = kv_indices;
    params.final_o = static_cast<Query*>(out);
    params.final_lse = lse;
    params.num_heads = flashinfer::uint_fastdiv(heads);
    params.block_size = flashinfer::uint_fastdiv(page_size);
    params.return_lse_base_on_e = true;
    params.sm_scale = softmax_scale;
    set_strides(params, heads, page_size);
    set_plan(params, float_workspace, int_workspace);
    return static_cast<int>(causal ? launch<MaskMode::kCausal>(params, stream)
                                   : launch<MaskMode::kNone>(params, stream));
}
