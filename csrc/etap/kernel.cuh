// The ETAP MLA decode kernel: persistent, one CTA per SM, one producer and two consumer warpgroups.
//
//   producer      lens -> plan | rope, latent 0..7 of tile 0 | tile 1 | tile 2 | ...
//   consumer 0                 | QK(0) softmax PV(0)         | QK(2) softmax PV(2) | ... exchange, store
//   consumer 1                 |         QK(1) softmax PV(1) | QK(3) ...           | ... exchange, store
//   all consumers              merge of the rows that several CTAs hold parts of
//
// With 64 rows both consumers work on every tile, and nothing is exchanged at the end.
#pragma once

#include "consumer_groups.cuh"
#include "merge.cuh"
#include "producer.cuh"

namespace etap {

// The page table's first use waits for the lengths: have it in L2 by then.
ETAP_DEVICE void prefetch_page_table(MlaDecodeParams const& p, int thread) {
  int const line = thread * gridDim.x + blockIdx.x, lines_per_row = (p.max_pages + 31) / 32;
  int const rows = p.page_indptr ? 1 : p.batch;
  if (p.page_table && thread < 32 && line < lines_per_row * rows) {
    prefetch_l2(p.page_table + line / lines_per_row * p.page_table_stride + line % lines_per_row * 32);
  }
}

// Likewise the queries: of each row, the latent part's 8 lines and the rope part's.
ETAP_DEVICE void prefetch_query(MlaDecodeParams const& p, int thread) {
  constexpr int kLines = kLatentDim * 2 / 128, kRowLines = kLines + 1;
  int const line = thread * gridDim.x + blockIdx.x, row = line / kRowLines, part = line % kRowLines;
  int const rows_each = p.q_len * p.num_heads, request = p.cu_seqlens_q ? 0 : row / rows_each;  // ragged: all as one's
  if (row >= (p.cu_seqlens_q ? p.cu_seqlens_q[p.batch] * p.num_heads : p.batch * rows_each)) return;
  bool const latent = part < kLines;
  int64_t const at = row_offset(p, latent ? p.q_nope_stride : p.q_rope_stride, request, 0, row - request * rows_each);
  prefetch_l2(static_cast<uint16_t const*>(latent ? p.q_nope : p.q_rope) + at + part % kLines * 64);
}

template <class Cfg>
ETAP_DEVICE void init_barriers(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int lane) {
  if (lane < Cfg::kRing) {
    smem.control.full[lane].init(p.box_rows ? 1 : 128);
    smem.control.empty[lane].init(4 * Cfg::kOwnerArrivals);
  }
  if (lane < kPieceBuffers) {
    smem.control.piece_full[lane].init(1);
    int const scale_warps = Cfg::kGroups && p.group_scale != nullptr;  // beside TMA
    smem.control.piece_empty[lane].init(p.box_rows ? 9 + scale_warps : 12);  // consumer and loading warps
  }
  if constexpr (Cfg::kGroups) {
    if (lane < kScaleTiles) {
      smem.control.scales_full[lane].init(p.box_rows ? 32 : 128);
      smem.control.scales_empty[lane].init(4);
    }
  }
  cutlass::arch::fence_barrier_init();
}

template <class T, class Cfg>
ETAP_DEVICE void consume(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int group, int warp, int lane) {
  int const thread = group * 128 + warp * 32 + lane;
  ConsumerState<Cfg> st;
  st.group = group, st.warp = warp, st.lane = lane;
  ETAP_ROLLED
  for (int index = 0;; ++index) {
    PieceInfo const& piece = await_piece(smem, index);
    if (piece.request < 0) break;
    int piece_thread = thread;
    keep(piece_thread);  // else addresses that it gives are kept, spilled, from piece to piece
    RowTarget* const rows = smem.control.rows[piece.table];
    if constexpr (Cfg::kE4m3) {
      target_rows<Cfg>(p, rows, piece, piece_thread);
      if constexpr (Cfg::kGroups) {
        load_query_groups<T>(p, smem, piece, piece_thread);
      } else {
        load_query_e4m3<T>(p, smem, piece, piece_thread);
      }
    } else {
      QueryVectors<Cfg> const query(p, piece, piece_thread);
      target_rows<Cfg>(p, rows, piece, piece_thread);
      query.store(smem, piece_thread);
    }
    MaskBounds const mask{piece.len, piece.row_tile * Cfg::kRowTile, piece.len - piece.q_len};
    int const begin = piece.begin, tiles = piece.end - begin, chunk = piece.first_chunk;
    sync_consumers();
    trace(kQueryThere, index == 0 && thread == 0);
    st.reset();
    if constexpr (Cfg::kGroups) {
      consume_tiles_groups<T>(p, smem, st, piece);
    } else if constexpr (Cfg::kE4m3) {
      consume_tiles_e4m3(p, smem, st, piece, mask);
    } else if constexpr (Cfg::kWide) {
      ETAP_ROLLED
      for (int i = 0; i < tiles; ++i) {
        consume_tile_wide<T>(p, smem, st, mask, RingPosition<Cfg>::at(chunk + i * Cfg::kRingTile), begin + i);
      }
    } else {
      ETAP_ROLLED
      for (int i = group; i < tiles; i += kConsumerGroups) {
        consume_tile<T>(p, smem, st, mask, RingPosition<Cfg>::at(chunk + i * Cfg::kRingTile), begin + i, i / 2 % 2);
      }
    }
    trace(kTilesDone, thread == 0);
    int lent = chunk + tiles * Cfg::kRingTile;
    if constexpr (Cfg::kGroups) lent = piece.first_chunk + (piece.end - piece.begin) * Cfg::kRingTile;  // read again
    if constexpr (Cfg::kWide) {
      finish_piece_wide<T>(p, smem, piece, st);
    } else {
      finish_piece<T>(p, smem, piece, st, RingPosition<Cfg>::at(lent));
    }
    trace(kPieceDone, thread == 0);
    if (!piece.whole() && thread == 0) smem.control.pending[piece.table] = piece;
    release_piece(smem, index, lane);
  }
  merge_pending<T>(p, smem, thread);
  trace(kEnded, thread == 0);
}

template <class T, class Cfg>
__global__ void __launch_bounds__(kThreads, 1)
    mla_decode_kernel(__grid_constant__ MlaDecodeParams const p, __grid_constant__ CUtensorMap const ckv_map,
                      __grid_constant__ CUtensorMap const kpe_map) {
  extern __shared__ uint8_t shared_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<Cfg>*>(shared_bytes);
  int const warp = cutlass::canonical_warp_idx_sync(), lane = threadIdx.x % 32;
  bool const plans = warp == 0, rehearses = warp == 2 && p.batch <= kMostOwned;
  trace(kStarted, plans && lane == 0);
  if (plans || rehearses) plan_launch<Cfg>(p, plan_control(smem, rehearses), lane, rehearses);
  __syncwarp();
  if (plans) {
    trace(kPlanned, lane == 0);
    NamedBarrier::arrive(kThreads, kBarrierStart);
    NamedBarrier::sync(128, kBarrierInit);  // with warps 1 to 3, long done
  } else {
    if (warp == 1) {
      init_barriers(p, smem, lane);
    } else if (warp == 2) {
      cutlass::arch::fence_view_async_shared();  // before TMA writes the ring
    } else if (warp == 3) {
      uint32_t const epoch = read_epoch(p);
      if (lane == 0 && p.box_rows) {
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&ckv_map));
        cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&kpe_map));
      }
      prefetch_page_table(p, lane);
      if (lane == 0) smem.control.epoch = epoch;
    } else if (warp == 4) {
      prefetch_query(p, lane);
    }
    if (warp < 4) NamedBarrier::arrive(128, kBarrierInit);
    NamedBarrier::sync(kThreads, kBarrierStart);
  }
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Cfg::kProducerRegisters>();
    if (warp == 3) write_empty_requests(p, lane);
    produce(p, ckv_map, kpe_map, smem, warp, lane);
    if (warp == 0) turn_workspace<Cfg>(p, smem.control.epoch, lane);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Cfg::kConsumerRegisters>();
    consume<T>(p, smem, warp / 4 - 1, warp % 4, lane);
  }
}

}  // namespace etap
