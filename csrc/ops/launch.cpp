// Host side of a launch: TMA descriptors, workspace layout, choice of the instance.
#include "etap/launch.h"

#include <algorithm>

#include "etap/cache_maps.h"
#include "etap/config.h"

namespace etap {
namespace {

using Launcher = cudaError_t (*)(int, MlaDecodeParams const&, CacheMaps const&, int, cudaStream_t);

}  // namespace

#define ETAP_DECLARE(NAME, ROW_TILE) \
  cudaError_t launch_##NAME##_##ROW_TILE(int, MlaDecodeParams const&, CacheMaps const&, int, cudaStream_t);
ETAP_DECLARE(bf16, 8)
ETAP_DECLARE(bf16, 16)
ETAP_DECLARE(bf16, 32)
ETAP_DECLARE(bf16, 64)
ETAP_DECLARE(fp16, 8)
ETAP_DECLARE(fp16, 16)
ETAP_DECLARE(fp16, 32)
ETAP_DECLARE(fp16, 64)
ETAP_DECLARE(bf16_e4m3, 8)
ETAP_DECLARE(bf16_e4m3, 16)
ETAP_DECLARE(bf16_e4m3, 32)
ETAP_DECLARE(fp16_e4m3, 8)
ETAP_DECLARE(fp16_e4m3, 16)
ETAP_DECLARE(fp16_e4m3, 32)
// A build without these kernels (an upstream's, which has no use for them) says so.
#if !defined(ETAP_WITHOUT_GROUPS)
ETAP_DECLARE(bf16_e4m3_groups, 16)
ETAP_DECLARE(bf16_e4m3_groups, 32)
ETAP_DECLARE(fp16_e4m3_groups, 16)
ETAP_DECLARE(fp16_e4m3_groups, 32)
ETAP_DECLARE(bf16_e4m3_groups_rope16, 16)
ETAP_DECLARE(bf16_e4m3_groups_rope16, 32)
ETAP_DECLARE(fp16_e4m3_groups_rope16, 16)
ETAP_DECLARE(fp16_e4m3_groups_rope16, 32)
#endif
#undef ETAP_DECLARE

namespace {

constexpr Launcher kLaunchers[4][2][4] = {  // [cache][query][row tile]
    {{launch_bf16_8, launch_bf16_16, launch_bf16_32, launch_bf16_64},
     {launch_fp16_8, launch_fp16_16, launch_fp16_32, launch_fp16_64}},
    {{launch_bf16_e4m3_8, launch_bf16_e4m3_16, launch_bf16_e4m3_32},
     {launch_fp16_e4m3_8, launch_fp16_e4m3_16, launch_fp16_e4m3_32}},
#if !defined(ETAP_WITHOUT_GROUPS)
    {{nullptr, launch_bf16_e4m3_groups_16, launch_bf16_e4m3_groups_32},
     {nullptr, launch_fp16_e4m3_groups_16, launch_fp16_e4m3_groups_32}},
    {{nullptr, launch_bf16_e4m3_groups_rope16_16, launch_bf16_e4m3_groups_rope16_32},
     {nullptr, launch_fp16_e4m3_groups_rope16_16, launch_fp16_e4m3_groups_rope16_32}},
#endif
};

// The driver's encoder, looked up once, so that nothing links against the driver.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static auto const encoder = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaError_t const status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
    bool const ok = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol) : nullptr;
  }();
  return encoder;
}

int element_bytes(LaunchConfig const& config) { return config.cache == CacheFormat::kQueryType ? 2 : 1; }

// (columns, rows of a page, pages), in boxes of 128 bytes, or all columns where they are less, x box_rows rows.
cudaError_t encode_cache(CUtensorMap* map, LaunchConfig const& config, void const* base, int columns,
                         MlaDecodeParams const& p, int box_rows, int64_t page_stride, int64_t row_stride) {
  int const bytes = element_bytes(config), box_cols = std::min(columns, 128 / bytes);
  auto const encode = tensor_map_encoder();
  if (!encode) return cudaErrorNotSupported;
  cuuint64_t const dims[3] = {cuuint64_t(columns), cuuint64_t(p.page_size), cuuint64_t(p.num_pages)};
  // A dimension of one element may have any stride; TMA wants a plausible one.
  cuuint64_t const row_bytes = p.page_size > 1 ? cuuint64_t(row_stride) * bytes : 1024;
  cuuint64_t const page_bytes =
      p.num_pages > 1 ? cuuint64_t(page_stride) * bytes : std::max<cuuint64_t>(row_bytes, 1024);
  cuuint64_t const strides[2] = {row_bytes, page_bytes};
  cuuint32_t const box[3] = {cuuint32_t(box_cols), cuuint32_t(box_rows), 1}, unit[3] = {1, 1, 1};
  CUtensorMapDataType const type = bytes == 1                      ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : config.dtype == Dtype::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  CUresult const result = encode(map, type, 3, const_cast<void*>(base), dims, strides, box, unit,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 box_cols * bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

bool tma_strides(void const* base, int64_t row_stride, int64_t page_stride, MlaDecodeParams const& p, int bytes) {
  auto const fits = [bytes](int64_t stride) {
    return stride * bytes % 16 == 0 && stride >= 0 && stride < (int64_t(1) << 40) / bytes;
  };
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && (p.page_size == 1 || fits(row_stride)) &&
         (p.num_pages == 1 || fits(page_stride));
}

cudaError_t resolve_p_parts(LaunchConfig const& config, int* p_parts) {
  *p_parts = config.p_parts;
  if (config.p_parts != 0) return cudaSuccess;
  int device = 0, sms = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) *p_parts = default_p_parts(config.cache, sms);
  return status;
}

}  // namespace

int tma_box_rows(MlaDecodeParams const& p, int element_bytes) {
  if (!tma_strides(p.ckv, p.ckv_row_stride, p.ckv_page_stride, p, element_bytes) ||
      !tma_strides(p.kpe, p.kpe_row_stride, p.kpe_page_stride, p, element_bytes)) {
    return 0;
  }
  if (!p.page_table) return kTileKeys;  // tiles start at multiples of 64 of the one page; its end is TMA's to mask
  int const rows = std::min(p.page_size & -p.page_size, kTileKeys);  // power of two that divides the page size
  return rows >= 8 ? rows : 0;
}

cudaError_t launch_mla_decode(MlaDecodeParams params, LaunchConfig const& config, cudaStream_t stream) {
  params.ctas_divmod = cutlass::FastDivmod(config.num_ctas);
  params.heads_divmod = cutlass::FastDivmod(params.num_heads);
  params.page_divmod = cutlass::FastDivmod(params.page_size);
  int rope_columns = kRopeDim;
  if (config.cache == CacheFormat::kE4m3GroupsRope16) {  // as bytes, like the latent part
    rope_columns *= 2;
    params.kpe_page_stride *= 2;
    params.kpe_row_stride *= 2;
  }
  int const bytes = element_bytes(config);
  params.box_rows = tma_box_rows(params, bytes);
  auto const aligned = [bytes](void const* base, int64_t row, int64_t page) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && row * bytes % 16 == 0 && page * bytes % 16 == 0;
  };
  params.gather_16b = aligned(params.ckv, params.ckv_row_stride, params.ckv_page_stride) &&
                      aligned(params.kpe, params.kpe_row_stride, params.kpe_page_stride);
  params.group_scale_16b = reinterpret_cast<uintptr_t>(params.group_scale) % 16 == 0 &&
                           params.group_scale_row_stride % 4 == 0 && params.group_scale_page_stride % 4 == 0;
  int p_parts = 0;
  cudaError_t status = resolve_p_parts(config, &p_parts);
  if (status != cudaSuccess) return status;
  CacheMaps maps{};
  auto const encode = [&](CUtensorMap* ckv, CUtensorMap* kpe, int box_rows) {
    status = encode_cache(ckv, config, params.ckv, kLatentDim, params, box_rows, params.ckv_page_stride,
                          params.ckv_row_stride);
    if (status != cudaSuccess) return;
    status = encode_cache(kpe, config, params.kpe, rope_columns, params, box_rows, params.kpe_page_stride,
                          params.kpe_row_stride);
  };
  if (params.box_rows) encode(&maps.ckv, &maps.kpe, params.box_rows);
  if (status == cudaSuccess && params.box_rows == kTileKeys) encode(&maps.ckv_end, &maps.kpe_end, kEndRows);
  if (status != cudaSuccess) return status;
  int const index = config.row_tile == 8 ? 0 : config.row_tile == 16 ? 1 : config.row_tile == 32 ? 2 : 3;
  auto const launch = kLaunchers[int(config.cache)][config.dtype == Dtype::kFp16][index];
  if (!launch) return cudaErrorInvalidValue;
  return launch(p_parts, params, maps, config.num_ctas, stream);
}

}  // namespace etap
