// The ETAP MLA decode kernel: persistent, one CTA per SM, one producer and two consumer warpgroups.
//
//   producer      lens -> plan | rope, latent 0..7 of tile 0          | tile 1 | tile 2 | ...
//   consumer 0    prefetch     | QK(0, even chunks) softmax PV(0, even) | QK(1, even) ... | ... store
//   consumer 1    prefetch     | QK(0, odd chunks)  softmax PV(0, odd)  | QK(1, odd)  ... | ... store
//   all consumers              merge of the rows that several CTAs hold parts of
//
// Or, where TileConfig is not wide, the consumers take tiles in turn, and exchange halves of O^T before they store.
#pragma once

#include "consumer_e4m3_wide.cuh"
#include "consumer_groups.cuh"
#include "consumer_registers.cuh"
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

// Likewise the queries: of each row, the latent part's 8 lines and the rope part's. Where there are more requests than
// CTAs, most are not needed soon, and would delay what is.
ETAP_DEVICE void prefetch_query(MlaDecodeParams const& p, int thread) {
  if (p.batch > int(gridDim.x)) return;
  constexpr int kLines = kLatentDim * 2 / 128, kRowLines = kLines + 1;
  int const rows_each = p.q_len * p.num_heads;
  int const rows = p.cu_seqlens_q ? p.cu_seqlens_q[p.batch] * p.num_heads : p.batch * rows_each;
  ETAP_ROLLED
  for (int line = thread * gridDim.x + blockIdx.x; line < rows * kRowLines; line += kConsumerThreads * gridDim.x) {
    int const row = line / kRowLines, part = line % kRowLines;
    int const request = p.cu_seqlens_q ? 0 : row / rows_each;  // ragged: all as one's
    bool const latent = part < kLines;
    int64_t const at = row_offset(p, latent ? p.q_nope_stride : p.q_rope_stride, request, 0, row - request * rows_each);
    prefetch_l2(static_cast<uint16_t const*>(latent ? p.q_nope : p.q_rope) + at + part % kLines * 64);
  }
}

// Likewise, of the cache, the first tile that this CTA will read if all requests are equally long: memory is at work
// before the plan is made. If they are not, it is another CTA that reads it.
template <class Cfg>
ETAP_DEVICE void prefetch_tile(MlaDecodeParams const& p, int thread) {
  constexpr int kLines = kLatentDim * Cfg::kElementBytes / 128;
  int const ctas = p.ctas_divmod.divisor;
  auto const tiles_of = [](int len) { return (len + kTileKeys - 1) / kTileKeys; };
  int const any = tiles_of(cache_len(p, min(int(blockIdx.x), p.batch - 1)));
  // As EvenCut, but with quotients that are off by one for very many tiles: it is another CTA's tile then.
  auto const about = [](int a, float by) { return __float2int_rz((float(a) + 0.5f) * by); };
  int const each = max(1, about(ctas_of(any * p.batch, p.batch, ctas), __fdividef(1.0f, float(p.batch))));
  float const by_each = __fdividef(1.0f, float(each));
  int const cta = own_cta(p, min(each * p.batch, ctas)), request = about(cta, by_each), part = cta - request * each;
  if (request >= p.batch) return;
  int const len = cache_len(p, request), tiles = tiles_of(len), shortest = about(tiles, by_each);
  int const key = (shortest * part + min(part, tiles - shortest * each)) * kTileKeys + thread / 4;
  if (unsigned(key) >= unsigned(len)) return;
  KeyPlace const place = locate_key(p, request, page_row(p, request), key);
  auto const row = [&](void const* base, int64_t page_stride, int64_t row_stride) {
    return static_cast<uint8_t const*>(base) + (place.page * page_stride + place.row * row_stride) * Cfg::kElementBytes;
  };
  uint8_t const* const latent = row(p.ckv, p.ckv_page_stride, p.ckv_row_stride) + thread % 4 * 128;
#pragma unroll
  for (int i = 0; i < kLines; i += 4) prefetch_l2(latent + i * 128);
  if (thread % 4 == 0) prefetch_l2(row(p.kpe, p.kpe_page_stride, p.kpe_row_stride));
}

template <class Cfg>
ETAP_DEVICE void init_barriers(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, int lane) {
  if (lane < Cfg::kRing) {
    smem.control.full[lane].init(p.box_rows ? 1 : 128);
    smem.control.empty[lane].init(128 * Cfg::kOwnerArrivals);
  }
  if (lane < kPieceBuffers) {
    smem.control.piece_full[lane].init(p.box_rows ? 1 : 1 + 3 * 32);
    int const scale_warps = Cfg::kGroups && p.group_scale != nullptr;  // beside TMA
    smem.control.piece_empty[lane].init(p.box_rows ? 32 * (9 + scale_warps) : kThreads);  // who consumes or loads
  }
  if constexpr (Cfg::kGroups) {
    if (lane < kScaleTiles) {
      smem.control.scales_full[lane].init(p.box_rows ? 32 : 128);
      smem.control.scales_empty[lane].init(kConsumerThreads);
    }
  }
  cutlass::arch::fence_barrier_init();
}

// The thread's number among the consumers, which is `thread`: with 64 rows read again, for kept it would be spilled.
template <class Cfg>
ETAP_DEVICE int consumer_thread(int thread) {
  if (Cfg::kRowTile < 64) return thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread - 128;
}

// A piece's query and its tiles. Returns the number of the chunk behind its last, since launch.
template <class T, class Cfg>
ETAP_DEVICE int consume_tiles(MlaDecodeParams const& p, SharedStorage<Cfg>& smem, ConsumerState<Cfg>& st,
                              PieceInfo const& piece, int thread, bool first) {
  int piece_thread = consumer_thread<Cfg>(thread);
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
  trace(kQueryThere, first && thread == 0);
  st.reset();
  if constexpr (Cfg::kGroups) {
    consume_tiles_groups<T>(p, smem, st, mask, piece, [&] { finish_statistics_wide(p, smem, piece, st); });
  } else if constexpr (Cfg::kE4m3 && Cfg::kWide) {
    consume_tiles_e4m3_wide(p, smem, st, mask, piece, [&] { finish_statistics_wide(p, smem, piece, st); });
  } else if constexpr (Cfg::kE4m3) {
    consume_tiles_e4m3(p, smem, st, piece, mask);
  } else if constexpr (Cfg::kWide) {
    ETAP_ROLLED
    for (int i = 0; i < tiles; ++i) {
      consume_tile_wide<T>(p, smem, st, mask, RingPosition<Cfg>::at(chunk + i * Cfg::kRingTile), begin + i, [&] {
        if (i + 1 == tiles) finish_statistics_wide(p, smem, piece, st);
      });
    }
  } else {
    ETAP_ROLLED
    for (int i = st.group; i < tiles; i += kConsumerGroups) {
      RingPosition<Cfg> const at = RingPosition<Cfg>::at(chunk + i * Cfg::kRingTile);
      if constexpr (Cfg::kFromRegisters) {
        consume_tile_from_registers<T>(p, smem, st, mask, at, begin + i, i / 2 % 2);
      } else {
        consume_tile<T>(p, smem, st, mask, at, begin + i, i / 2 % 2);
      }
    }
  }
  trace(kTilesDone, thread == 0);
  return chunk + tiles * Cfg::kRingTile;
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
    int const lent = consume_tiles<T>(p, smem, st, piece, thread, index == 0);
    if constexpr (Cfg::kWide) {
      finish_piece_wide<T>(p, smem, piece, st);
    } else {
      finish_piece<T>(p, smem, piece, st, RingPosition<Cfg>::at(lent));
    }
    trace(kPieceDone, thread == 0);
    int const own = consumer_thread<Cfg>(thread);
    if (!piece.whole() && own == 0) smem.control.pending[piece.table] = piece;
    if (Cfg::kRowTile == 64) keep(index);  // else a copy of it is spilled
    release_piece(smem, index);
  }
  merge_pending<T>(p, smem, consumer_thread<Cfg>(thread));
  trace(kEnded, thread == 0);
}

// The producer warpgroup until there is work: the plan, and what it finds ready. Returns where the first box lies that
// the lane looks up, in the warp that plans.
template <class Cfg>
ETAP_DEVICE KeyPlace prepare(MlaDecodeParams const& p, CacheMaps const& maps, SharedStorage<Cfg>& smem, int warp,
                             int lane) {
  KeyPlace first{0, 0};
  if (warp == 0) {
    WorkTotals const totals = plan_launch<Cfg>(p, smem.control, lane, [&](Piece const& piece, int len) {
      if (p.box_rows) {
        first = BoxLane(p, lane).look_up(p, piece.request, page_row(p, piece.request), len, piece.begin);
      }
    });
    __syncwarp();
    trace(kPlanned, lane == 0);
    NamedBarrier::arrive(kThreads, kBarrierStart);
    if (lane == 0) smem.control.cache_hint = cache_hint<Cfg>(p, totals);  // the first piece is posted behind it
    NamedBarrier::sync(128, kBarrierInit);  // with warps 1 to 3, long done
    return first;
  }
  if (warp == 1) {
    init_barriers(p, smem, lane);
  } else if (warp == 3) {
    uint32_t const epoch = read_epoch(p);
    auto const prefetch = [](CUtensorMap const& map) {
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&map));
    };
    if (lane == 0 && p.box_rows) prefetch(maps.ckv), prefetch(maps.kpe);
    if (lane == 0 && p.box_rows == kTileKeys) prefetch(maps.ckv_end), prefetch(maps.kpe_end);
    prefetch_page_table(p, lane);
    if (lane == 0) smem.control.epoch = epoch;
  }
  NamedBarrier::arrive(128, kBarrierInit);
  NamedBarrier::sync(kThreads, kBarrierStart);
  return first;
}

template <class T, class Cfg>
__global__ void __launch_bounds__(kThreads, 1)
    mla_decode_kernel(__grid_constant__ MlaDecodeParams const p, __grid_constant__ CacheMaps const maps) {
  extern __shared__ uint8_t shared_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<Cfg>*>(shared_bytes);
  int const warp = cutlass::canonical_warp_idx_sync(), lane = threadIdx.x % 32;
  trace(kStarted, warp == 0 && lane == 0);
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Cfg::kProducerRegisters>();
    KeyPlace const first = prepare(p, maps, smem, warp, lane);
    if (warp == 3) write_empty_requests(p, lane);
    produce(p, maps, smem, first, warp, lane);
    if (warp == 0) turn_workspace<Cfg>(p, smem.control.epoch, lane);
  } else {
    prefetch_query(p, threadIdx.x - 128);  // first, for it takes no length
    prefetch_tile<Cfg>(p, threadIdx.x - 128);
    cutlass::arch::warpgroup_reg_alloc<Cfg::kConsumerRegisters>();
    NamedBarrier::sync(kThreads, kBarrierStart);
    consume<T>(p, smem, warp / 4 - 1, warp % 4, lane);
  }
}

}  // namespace etap
