// Arguments of one launch. Every tensor is described by a pointer and strides in elements; the last dimension is
// contiguous throughout.
#pragma once

#include <cutlass/fast_math.h>

#include <cstdint>

#include "config.h"

namespace etap {

struct RowStrides {  // of a tensor indexed (batch, token, head, column); ragged tensors have batch == 0
  int64_t batch, token, head;
};

struct MlaDecodeParams {
  cutlass::FastDivmod ctas_divmod;   // by the launch's CTAs; set by launch_mla_decode

  // problem
  int batch, num_heads;         // at least 1
  cutlass::FastDivmod heads_divmod;  // by num_heads; set by launch_mla_decode, as page_divmod
  int q_len;                    // tokens per request, or the most of any request when ragged
  int const* cu_seqlens_q;      // [batch + 1] or null
  int const* cache_seqlens;     // [batch]; below 0 counts as 0, above the capacity as the capacity
  bool causal;                  // bottom-right aligned
  float scale_log2;             // softmax scale x log2(e)

  // query, 16-bit: (batch, token, head, 512) and (batch, token, head, 64)
  void const* q_nope;
  void const* q_rope;
  RowStrides q_nope_stride, q_rope_stride;

  // cache: (pages, page_size, 512) and (pages, page_size, 64)
  void const* ckv;
  void const* kpe;
  int64_t ckv_page_stride, ckv_row_stride, kpe_page_stride, kpe_row_stride;
  int num_pages, page_size;
  cutlass::FastDivmod page_divmod;
  int capacity;                 // keys that the page table, or the unpaged cache, has room for
  int const* page_table;        // null: the cache is not paged, and page b (or cache_batch_idx[b]) is request b's
  int const* cache_batch_idx;   // [batch] or null; only without a page table
  int64_t page_table_stride;
  int const* page_indptr;       // [batch] or null: request b's pages begin at page_table[page_indptr[b]] (CSR)
  int max_pages;                // page-table entries per request; with page_indptr, of all requests
  int box_rows;                 // keys per TMA box (8 to 64), or 0: gather by cp.async
  bool gather_16b;              // gather rows are 16-byte aligned

  // e4m3 cache: what its elements are multiplied by, per request where a stride is not 0; the value if no pointer
  float ckv_scale, kpe_scale;
  float const* ckv_scale_data;
  float const* kpe_scale_data;
  int64_t ckv_scale_stride, kpe_scale_stride;

  // output
  void* out;                    // (batch, token, head, 512)
  RowStrides out_stride;
  bool out_fp32;
  float* lse;                   // or null
  RowStrides lse_stride;
  float lse_unit;               // ln 2: natural log; 1: base 2

  void* workspace;              // workspace.cuh

  // e4m3 cache with scales for groups of latent columns: (pages, page_size, 4), or null: ckv_scale for all. A 16-bit
  // rope part beside it counts as 128 columns of bytes, in its strides too.
  float const* group_scale;
  int64_t group_scale_page_stride, group_scale_row_stride;
  bool group_scale_16b;         // a key's four lie on a multiple of 16 bytes; set by launch_mla_decode
};

// Of a slot of the workspace, when its buffer's turn is over: statistics and O^T erased; both there; statistics erased,
// O^T of the launch that used the buffer last.
enum class SlotState : uint8_t { kErased, kUsed, kLeft };

// What a workspace starts with: all zero before its first launch. Host code knows its size only.
struct WorkspaceHeader {
  uint32_t epoch;                 // launches so far
  uint32_t readers;               // CTAs of this launch that are done with the epoch
  uint32_t pad[2];
  SlotState slots[kMaxCtas][2][2];  // [CTA][buffer][slot of the CTA]
};

constexpr int kWorkspaceHeaderBytes = 2048;
static_assert(sizeof(WorkspaceHeader) <= kWorkspaceHeaderBytes);

// A word that no arithmetic instruction produces (its NaNs are 0x7fffffff): "not written yet".
constexpr uint32_t kUnwritten = 0xffffffffu;

}  // namespace etap
