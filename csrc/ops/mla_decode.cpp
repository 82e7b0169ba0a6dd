// torch.ops.etap.mla_decode: checks what the kernel relies on, fills MlaDecodeParams, launches.
// The Python front end (etap_integration/ops.py) documents the operator and gives the friendlier errors.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>

#include "etap/config.h"
#include "etap/launch.h"
#include "workspace.h"

namespace etap {
namespace {

// Strides of (batch, token, head, column), or of a ragged (token, head, column).
RowStrides row_strides(at::Tensor const& t) {
  if (t.dim() == 4) return {t.stride(0), t.stride(1), t.stride(2)};
  return {0, t.stride(0), t.stride(1)};
}

bool rows_aligned(at::Tensor const& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.stride(-1) == 1;
  for (int64_t d = 0; d < t.dim() - 1; ++d) aligned &= t.size(d) == 1 || t.stride(d) * t.element_size() % 16 == 0;
  return aligned;
}

void check_cache(char const* name, at::Tensor const& t, int64_t width, at::Tensor const& q) {
  bool const one_head = t.dim() == 4 && t.size(2) == 1;  // as the upstream interfaces have it
  TORCH_CHECK((t.dim() == 3 || one_head) && t.size(-1) == width, name, " must be (pages, page_size, ", width,
              ") or (pages, page_size, 1, ", width, "), got ", t.sizes());
  TORCH_CHECK(t.scalar_type() == q.scalar_type() || t.scalar_type() == at::kFloat8_e4m3fn, name,
              " must have q_nope's dtype ", q.scalar_type(), " or be float8_e4m3fn, got ", t.scalar_type());
  TORCH_CHECK(t.stride(-1) == 1, name, " must be contiguous in its last dimension, got strides ", t.strides());
  TORCH_CHECK(t.device() == q.device(), name, " must be on ", q.device(), ", got ", t.device());
}

int const* int32_data(char const* name, std::optional<at::Tensor> const& t, at::Tensor const& q, int64_t dims) {
  if (!t) return nullptr;
  TORCH_CHECK(t->scalar_type() == at::kInt, name, " must be int32, got ", t->scalar_type());
  TORCH_CHECK(t->device() == q.device(), name, " must be on ", q.device(), ", got ", t->device());
  TORCH_CHECK(t->dim() == dims && (t->size(-1) <= 1 || t->stride(-1) == 1), name, " must have ", dims,
              " dimensions, the last contiguous, got shape ", t->sizes(), ", strides ", t->strides());
  return t->const_data_ptr<int>();
}

// The device's copy of a scale: one for all requests, or one for each.
float const* scale_data(char const* name, std::optional<at::Tensor> const& t, at::Tensor const& q, int64_t batch,
                        int64_t* stride) {
  *stride = 0;
  if (!t || t->numel() == 0) return nullptr;
  TORCH_CHECK(t->scalar_type() == at::kFloat && t->device() == q.device(), name, " must be float32 on ", q.device(),
              ", got ", t->scalar_type(), " on ", t->device());
  TORCH_CHECK(t->numel() == 1 || (t->dim() == 1 && t->size(0) == batch), name,
              " must have 1 element or one per request (", batch, "), got ", t->sizes());
  if (t->numel() > 1) *stride = t->stride(0);
  return t->const_data_ptr<float>();
}

// Scales for each key and kScaleGroup latent columns.
float const* group_scale_data(std::optional<at::Tensor> const& t, at::Tensor const& ckv, MlaDecodeParams* params) {
  if (!t) return nullptr;
  TORCH_CHECK(t->scalar_type() == at::kFloat && t->device() == ckv.device(), "ckv_scale_arr must be float32 on ",
              ckv.device(), ", got ", t->scalar_type(), " on ", t->device());
  TORCH_CHECK(t->dim() == 3 && t->size(0) == ckv.size(0) && t->size(1) == ckv.size(1) && t->size(2) == kScaleGroups &&
                  t->stride(2) == 1,
              "ckv_scale_arr must be (", ckv.size(0), ", ", ckv.size(1), ", ", kScaleGroups,
              "), contiguous in its last dimension, got ", t->sizes(), ", strides ", t->strides());
  params->group_scale_page_stride = t->stride(0);
  params->group_scale_row_stride = t->stride(1);
  return t->const_data_ptr<float>();
}

void mla_decode(at::Tensor const& q_nope, at::Tensor const& q_rope, at::Tensor const& ckv_cache,
                at::Tensor const& kpe_cache, std::optional<at::Tensor> const& page_table,
                at::Tensor const& cache_seqlens, std::optional<at::Tensor> const& cu_seqlens_q, int64_t max_seqlen_q,
                double softmax_scale, bool causal, at::Tensor& out, std::optional<at::Tensor> lse, int64_t num_ctas,
                int64_t p_parts, std::optional<at::Tensor> const& ckv_scale, std::optional<at::Tensor> const& kpe_scale,
                double ckv_scale_value, double kpe_scale_value, std::optional<at::Tensor> const& cache_batch_idx,
                std::optional<at::Tensor> const& ckv_scale_arr) {
  bool const ragged = cu_seqlens_q.has_value();
  TORCH_CHECK(q_nope.is_cuda(), "q_nope must be a CUDA tensor, got ", q_nope.device());
  TORCH_CHECK(q_nope.scalar_type() == at::kBFloat16 || q_nope.scalar_type() == at::kHalf,
              "q_nope must be bfloat16 or float16, got ", q_nope.scalar_type());
  TORCH_CHECK(q_nope.dim() == (ragged ? 3 : 4) && q_nope.size(-1) == kLatentDim, "q_nope must be ",
              ragged ? "(total_q, heads, 512)" : "(batch, seqlen_q, heads, 512)", ", got ", q_nope.sizes());
  TORCH_CHECK(q_rope.dim() == q_nope.dim() && q_rope.size(-1) == kRopeDim &&
                  q_rope.sizes().slice(0, q_rope.dim() - 1) == q_nope.sizes().slice(0, q_nope.dim() - 1),
              "q_rope must be q_nope's shape with 64 columns, got ", q_rope.sizes(), " beside ", q_nope.sizes());
  TORCH_CHECK(q_rope.scalar_type() == q_nope.scalar_type() && q_rope.device() == q_nope.device(),
              "q_rope must have q_nope's dtype and device");
  check_cache("ckv_cache", ckv_cache, kLatentDim, q_nope);
  check_cache("kpe_cache", kpe_cache, kRopeDim, q_nope);
  TORCH_CHECK(ckv_cache.size(0) == kpe_cache.size(0) && ckv_cache.size(1) == kpe_cache.size(1),
              "ckv_cache and kpe_cache must agree in pages and page size, got ", ckv_cache.sizes(), " and ",
              kpe_cache.sizes());
  bool const e4m3 = ckv_cache.scalar_type() == at::kFloat8_e4m3fn;
  bool const rope16 = e4m3 && kpe_cache.scalar_type() != at::kFloat8_e4m3fn;
  TORCH_CHECK(e4m3 || ckv_cache.scalar_type() == kpe_cache.scalar_type(), "kpe_cache must have ckv_cache's dtype ",
              ckv_cache.scalar_type(), ", got ", kpe_cache.scalar_type());
  TORCH_CHECK(e4m3 || (!ckv_scale && ckv_scale_value == 1.0 && !ckv_scale_arr),
              "ckv_scale and ckv_scale_arr are for a float8_e4m3fn cache, got ", ckv_cache.scalar_type());
  TORCH_CHECK((e4m3 && !rope16) || (!kpe_scale && kpe_scale_value == 1.0),
              "kpe_scale is for a float8_e4m3fn cache, got ", kpe_cache.scalar_type());
  TORCH_CHECK(!ckv_scale_arr || (!ckv_scale && ckv_scale_value == 1.0), "ckv_scale does not go with ckv_scale_arr");
  TORCH_CHECK(out.sizes() == q_nope.sizes() && out.device() == q_nope.device() &&
                  (out.scalar_type() == q_nope.scalar_type() || out.scalar_type() == at::kFloat) && rows_aligned(out),
              "out must have q_nope's shape and device, its dtype or float32, and 16-byte aligned rows");
  TORCH_CHECK(p_parts >= 0 && p_parts <= 2, "p_parts must be 1 or 2, or 0 for the GPU's default, got ", p_parts);
  TORCH_CHECK(num_ctas >= 0 && num_ctas <= kMaxCtas, "num_ctas must be 0 to ", kMaxCtas, ", got ", num_ctas);

  MlaDecodeParams params{};
  params.cache_seqlens = int32_data("cache_seqlens", cache_seqlens, q_nope, 1);
  params.cu_seqlens_q = int32_data("cu_seqlens_q", cu_seqlens_q, q_nope, 1);
  params.page_table = int32_data("page_table", page_table, q_nope, 2);
  params.cache_batch_idx = int32_data("cache_batch_idx", cache_batch_idx, q_nope, 1);
  params.batch = static_cast<int>(cache_seqlens.size(0));
  params.num_heads = static_cast<int>(q_nope.size(-2));
  if (params.batch == 0 || q_nope.numel() == 0) return;
  if (ragged) {
    TORCH_CHECK(cu_seqlens_q->size(0) == params.batch + 1, "cu_seqlens_q must have batch + 1 entries, got ",
                cu_seqlens_q->size(0), " for batch ", params.batch);
  } else {
    TORCH_CHECK(q_nope.size(0) == params.batch, "cache_seqlens must have one entry per request (", q_nope.size(0),
                "), got ", params.batch);
    max_seqlen_q = q_nope.size(1);
  }
  if (page_table) {
    TORCH_CHECK(page_table->size(0) == params.batch, "page_table must have ", params.batch, " rows, got ",
                page_table->size(0));
    TORCH_CHECK(!cache_batch_idx, "cache_batch_idx goes with an unpaged cache, not with a page_table");
  } else if (cache_batch_idx) {
    TORCH_CHECK(cache_batch_idx->size(0) == params.batch, "cache_batch_idx must have one entry per request (",
                params.batch, "), got ", cache_batch_idx->size(0));
  } else {
    TORCH_CHECK(ckv_cache.size(0) >= params.batch, "an unpaged ckv_cache must have one row per request (", params.batch,
                "), got ", ckv_cache.size(0));
  }

  c10::cuda::CUDAGuard const guard(q_nope.device());
  cudaDeviceProp const* const device = at::cuda::getCurrentDeviceProperties();
  TORCH_CHECK(device->major == 9, "etap::mla_decode needs a Hopper GPU (compute capability 9.0), got ", device->name);
  cudaStream_t const stream = at::cuda::getCurrentCUDAStream();

  at::Tensor const nope = rows_aligned(q_nope) ? q_nope : q_nope.clone(at::MemoryFormat::Contiguous);
  at::Tensor const rope = rows_aligned(q_rope) ? q_rope : q_rope.clone(at::MemoryFormat::Contiguous);
  params.q_len = static_cast<int>(max_seqlen_q);
  params.causal = causal && max_seqlen_q > 1;
  // A scale of 0 would turn a mask's -inf into NaN.
  params.scale_log2 = softmax_scale == 0.0 ? std::numeric_limits<float>::min() : float(softmax_scale * M_LOG2E);
  params.q_nope = nope.const_data_ptr();
  params.q_rope = rope.const_data_ptr();
  params.q_nope_stride = row_strides(nope);
  params.q_rope_stride = row_strides(rope);
  params.ckv = ckv_cache.const_data_ptr();
  params.kpe = kpe_cache.const_data_ptr();
  params.ckv_page_stride = ckv_cache.stride(0);
  params.ckv_row_stride = ckv_cache.stride(1);
  params.kpe_page_stride = kpe_cache.stride(0);
  params.kpe_row_stride = kpe_cache.stride(1);
  params.num_pages = static_cast<int>(ckv_cache.size(0));
  params.page_size = static_cast<int>(ckv_cache.size(1));
  params.page_table_stride = page_table ? page_table->stride(0) : 0;
  params.max_pages = page_table ? static_cast<int>(page_table->size(1)) : 0;
  params.capacity = static_cast<int>(std::min<int64_t>(
      page_table ? int64_t(params.max_pages) * params.page_size : params.page_size, std::numeric_limits<int>::max()));
  params.out = out.mutable_data_ptr();
  params.out_stride = row_strides(out);
  params.out_fp32 = out.scalar_type() == at::kFloat;
  if (lse) {
    TORCH_CHECK(lse->scalar_type() == at::kFloat && lse->device() == q_nope.device() && lse->dim() == (ragged ? 2 : 3),
                "lse must be float32 (batch, heads, seqlen_q), or (heads, total_q) when ragged, got ", lse->sizes());
    params.lse = lse->mutable_data_ptr<float>();
    params.lse_stride = ragged ? RowStrides{0, lse->stride(1), lse->stride(0)}
                               : RowStrides{lse->stride(0), lse->stride(2), lse->stride(1)};
  }
  params.lse_unit = static_cast<float>(M_LN2);
  params.ckv_scale = static_cast<float>(ckv_scale_value);
  params.kpe_scale = static_cast<float>(kpe_scale_value);
  params.ckv_scale_data = scale_data("ckv_scale", ckv_scale, q_nope, params.batch, &params.ckv_scale_stride);
  params.kpe_scale_data = scale_data("kpe_scale", kpe_scale, q_nope, params.batch, &params.kpe_scale_stride);
  params.group_scale = group_scale_data(ckv_scale_arr, ckv_cache, &params);

  LaunchConfig config;
  config.dtype = q_nope.scalar_type() == at::kBFloat16 ? Dtype::kBf16 : Dtype::kFp16;
  config.cache = rope16          ? CacheFormat::kE4m3GroupsRope16  // with ckv_scale too
                 : ckv_scale_arr ? CacheFormat::kE4m3Groups
                 : e4m3          ? CacheFormat::kE4m3
                                 : CacheFormat::kQueryType;
  config.row_tile = row_tile_for(max_seqlen_q * params.num_heads, config.cache);
  config.p_parts = static_cast<int>(p_parts);
  int const sms = device->multiProcessorCount;
  config.num_ctas = num_ctas == 0 ? sms : static_cast<int>(std::min<int64_t>(num_ctas, sms));
  C10_CUDA_CHECK(acquire_workspace(q_nope.get_device(), stream, config, &params.workspace));
  C10_CUDA_CHECK(launch_mla_decode(params, config, stream));
}

}  // namespace
}  // namespace etap

TORCH_LIBRARY_FRAGMENT(etap, m) {
  m.def(
      "mla_decode(Tensor q_nope, Tensor q_rope, Tensor ckv_cache, Tensor kpe_cache, Tensor? page_table, "
      "Tensor cache_seqlens, Tensor? cu_seqlens_q, int max_seqlen_q, float softmax_scale, bool causal, "
      "Tensor(a!) out, Tensor(b!)? lse, int num_ctas, int p_parts, Tensor? ckv_scale=None, "
      "Tensor? kpe_scale=None, float ckv_scale_value=1., float kpe_scale_value=1., Tensor? cache_batch_idx=None, "
      "Tensor? ckv_scale_arr=None) -> ()");
}

TORCH_LIBRARY_IMPL(etap, CUDA, m) { m.impl("mla_decode", &etap::mla_decode); }
