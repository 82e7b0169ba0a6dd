// Python module etap_integration._C._host: the kernel's host-side facts, from the headers that the kernel is compiled
// from. Needs neither CUDA nor torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "etap/config.h"
#include "etap/schedule.h"

namespace {

using PieceTuple = std::tuple<int, int, int, int, int, int, int>;

std::vector<etap::RequestWork> request_work(std::vector<int> const& lengths,
                                            std::optional<std::vector<int>> const& q_lens, int heads, int row_tile) {
  if (q_lens && q_lens->size() != lengths.size()) throw pybind11::value_error("q_lens must have one entry per length");
  if (heads < 1 || row_tile < 1) throw pybind11::value_error("heads and row_tile must be at least 1");
  std::vector<etap::RequestWork> work;
  for (size_t i = 0; i < lengths.size(); ++i) {
    int const len = etap::max_int(lengths[i], 0), q_len = q_lens ? (*q_lens)[i] : 1;
    work.push_back({(len + etap::kTileKeys - 1) / etap::kTileKeys, (q_len * heads + row_tile - 1) / row_tile});
  }
  return work;
}

// The pieces of every CTA, by block index: (request, row tile, first tile, end tile, parts, part, workspace slot).
std::vector<std::vector<PieceTuple>> cta_work(std::vector<int> const& lengths,
                                              std::optional<std::vector<int>> const& q_lens, int heads, int row_tile,
                                              int num_ctas, bool uneven) {
  if (num_ctas < 1) throw pybind11::value_error("num_ctas must be at least 1");
  auto const work = request_work(lengths, q_lens, heads, row_tile);
  etap::WorkTotals totals;
  for (auto const& w : work) totals.add(w);
  bool single = true;
  for (auto const& w : work) single = single && w.row_tiles <= 1;
  bool const ranks = single && etap::may_deal(row_tile) && int(work.size()) > etap::kMostOwned &&
                     int(work.size()) <= etap::kept_requests(row_tile);
  std::vector<int> order(work.size());  // by length; the device finds the n-th with a warp-wide search
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  auto const bin = [&](int b) {
    int const tiles = work[b].tiles * work[b].row_tiles;
    return tiles ? etap::length_bin(tiles, totals.longest) : -1;
  };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return bin(a) > bin(b); });
  etap::Plan const plan = etap::make_plan(totals, num_ctas, row_tile, uneven, ranks, [&](int share) {
    int ctas = 0;
    for (auto const& w : work) ctas += etap::aligned_ctas(w, share);
    return ctas;
  });
  std::vector<std::vector<PieceTuple>> result(num_ctas);
  auto const add = [&](int block, etap::Piece const& p) {
    result[block].emplace_back(p.request, p.row_tile, p.begin, p.end, p.num_parts, p.part, p.slot(p.part));
  };
  for (int block = 0; block < num_ctas; ++block) {
    int const cta = etap::spread_cta(block, plan.num_ctas, num_ctas, [&](int n) { return n / num_ctas; });
    if (cta >= plan.num_ctas) continue;
    if (plan.dealt) {
      for (int i = 0, rank; (rank = etap::dealt_rank(plan.num_ctas, cta, i)) < totals.virtual_requests; ++i) {
        add(block, etap::whole_piece(order[rank], work[order[rank]].tiles, cta));
      }
      continue;
    }
    int request = 0, prefix = 0;  // the device finds these with a warp-wide search
    while (prefix + etap::plan_weight(plan, work[request]) <= etap::plan_target(plan, cta)) {
      prefix += etap::plan_weight(plan, work[request++]);
    }
    etap::PieceCursor cursor(plan, cta, request, prefix);
    for (etap::Piece p; cursor.next([&](int b) { return work[b]; }, p);) {
      add(block, p);
    }
  }
  return result;
}

using etap::CacheFormat;

template <int RowTile, int PParts, CacheFormat Format>
pybind11::dict config() {
  using Cfg = etap::TileConfig<RowTile, PParts, Format>;
  pybind11::dict d;
  d["cache"] = Cfg::kRope16  ? "e4m3 groups, 16-bit rope"
               : Cfg::kGroups ? "e4m3 groups"
               : Cfg::kE4m3   ? "e4m3"
                              : "16-bit";
  d["row_tile"] = RowTile;
  d["p_parts"] = PParts;
  d["wgmma_n"] = std::vector<int>{Cfg::kRowTile, Cfg::kPvRows};  // of S^T and of O^T
  d["smem_bytes"] = Cfg::kSharedBytes;
  d["ring_chunks"] = Cfg::kRing;
  d["threads"] = etap::kThreads;
  return d;
}

template <CacheFormat Format, int... RowTiles>
void add_configs(std::vector<pybind11::dict>& list) {
  (list.insert(list.end(), {config<RowTiles, 1, Format>(), config<RowTiles, 2, Format>()}), ...);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Work split and tile configurations of the ETAP kernel.";
  m.def("cta_work", &cta_work, pybind11::arg("lengths"), pybind11::arg("q_lens"), pybind11::arg("heads"),
        pybind11::arg("row_tile"), pybind11::arg("num_ctas"), pybind11::arg("uneven") = true,
        "Pieces per CTA, by block index: (request, row tile, first tile, end tile, parts, part, workspace slot). "
        "Lengths in keys, tiles of 64 keys. uneven: as for kernels whose limit is memory (16-bit, P in two parts). "
        "Raises ValueError for inconsistent arguments.");
  m.def("kernel_configs", [] {
    std::vector<pybind11::dict> list;
    add_configs<CacheFormat::kQueryType, 8, 16, 32, 64>(list);
    add_configs<CacheFormat::kE4m3, 8, 16, 32>(list);
    add_configs<CacheFormat::kE4m3Groups, 16, 32>(list);
    add_configs<CacheFormat::kE4m3GroupsRope16, 16, 32>(list);
    return list;
  }, "One dict per tile configuration; sizes in bytes, ring_chunks of 8 KiB.");
  m.def("build_info", [] {
    pybind11::dict d;
    d["compiler"] = __VERSION__;
    d["tile_keys"] = etap::kTileKeys;
    return d;
  }, "How this module was built.");
}
