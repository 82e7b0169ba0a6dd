// How the work of one launch is divided over CTAs: from lengths alone, on the device, without a host
// synchronisation. Plain C++17 under ETAP_HD, so that the CPU tests run the partition the GPU runs.
//
// A request of n tiles and r row tiles is r "virtual requests" of n tiles each. Four ways to cut them:
//   aligned  every CTA gets one piece; a virtual request is cut into ceil(n / share) equal pieces
//   dealt    whole requests, the longest first, to the CTAs in turn, to and fro
//   whole    all tiles in one line, cut into equal shares; a virtual request goes as a whole where its first tile is
//   flat     likewise, but cut where the shares end, or where two virtual requests meet close by: a CTA may hold pieces
//            of several requests, of which only its first and its last can be partial
// In this order, the first that is balanced enough (whole: only equally long ones); flat if shares are long. Merges at
// the end cost some 5 us, while an uneven cut costs little as long as memory is the limit: CTAs that have more left
// draw what those that are through leave, until less than half of them are left.
#pragma once

#if defined(__CUDACC__)
#define ETAP_HD __host__ __device__ __forceinline__
#define ETAP_ROLLED _Pragma("unroll 1")  // short code starts faster: cold instructions come from L2 or beyond
#else
#define ETAP_HD inline
#define ETAP_ROLLED
#endif

namespace etap {

ETAP_HD int min_int(int a, int b) { return a < b ? a : b; }
ETAP_HD int max_int(int a, int b) { return a > b ? a : b; }

// a / b for a >= 0, b > 0 and a / b < 2^21 (2^21 tiles in one CTA are 154 GB of cache). On the device, where this lies
// on the critical path of short launches, a float quotient takes a third of an integer division's instructions; it is
// off by one at most.
ETAP_HD int quotient(int a, int b) {
#if defined(__CUDA_ARCH__)
  int const q = __float2int_rz(__fdividef(float(a), float(b))), rest = a - q * b;
  return q + (rest >= b) - (rest < 0);
#else
  return a / b;
#endif
}
ETAP_HD int quotient_up(int a, int b) { return quotient(a + b - 1, b); }

// Cuts `total` things into `parts` runs whose lengths differ by at most one, the longer ones first.
struct EvenCut {
  int base, longer;

  EvenCut() = default;
  ETAP_HD EvenCut(int total, int parts) : base(quotient(total, parts)), longer(total - base * parts) {}
  ETAP_HD int begin(int part) const { return base * part + min_int(part, longer); }
  ETAP_HD int owner(int thing) const {
    int const cut = longer * (base + 1);
    return thing < cut ? quotient(thing, base + 1) : longer + quotient(thing - cut, base);
  }
};

// Work of one request: 64-key tiles of each row tile, and row tiles.
struct RequestWork {
  int tiles, row_tiles;
};

// Sums over the requests, from which the plan follows.
struct WorkTotals {
  int tiles = 0;             // over all virtual requests
  int longest = 0;           // most tiles of one
  int virtual_requests = 0;  // that have tiles

  ETAP_HD void add(RequestWork w) {
    tiles += w.tiles * w.row_tiles;
    longest = max_int(longest, w.row_tiles ? w.tiles : 0);
    virtual_requests += w.tiles ? w.row_tiles : 0;
  }
};

// CTAs that a request needs under the aligned cut.
ETAP_HD int aligned_ctas(RequestWork w, int share) { return quotient_up(w.tiles, share) * w.row_tiles; }

struct Plan {
  int total_tiles;  // over all virtual requests
  int num_ctas;     // CTAs that take part
  int share;        // aligned: most tiles per CTA; else 0
  EvenCut flat;     // of total_tiles over num_ctas
  bool whole;       // flat line: no virtual request is cut
  int slack;        // flat: how far a cut may move, in tiles, to where two virtual requests meet
  bool dealt;       // whole requests, by rank

  // Where the cut that is due at `at` falls, in or at an end of the virtual request of `tiles` from `start` on.
  ETAP_HD int cut(int at, int start, int tiles) const {
    int const below = at - start, above = tiles - below;
    if (min_int(below, above) > slack) return at;
    return below <= above ? start : start + tiles;
  }
};

struct Piece {      // in this order, nvcc 13.0 spills nothing on its way to shared memory
  int request;
  int begin, end;   // tiles of the virtual request
  int row_tile;
  int num_parts;    // CTAs that hold a piece of it
  int part;         // this one's rank among them
  int first_cta;
  int first_slot;   // workspace slot of part 0; CTA c owns slots 2c (its first piece) and 2c + 1 (its last)

  ETAP_HD bool whole() const { return num_parts == 1; }
  ETAP_HD int slot(int i) const { return i == 0 ? first_slot : 2 * (first_cta + i); }
};

// Of few tiles, fewer CTAs have more each: fewer partial results to merge, and 64 SMs draw nearly all that memory
// gives. From half as many tiles on, that is worth it for requests in many parts or (as many as these CTAs) in one.
// Measured.
constexpr int kFewTiles = 512, kFewCtas = 64;

// CTAs of a launch that its work is divided over, at most.
ETAP_HD int ctas_of(int tiles, int virtual_requests, int grid) {
  bool const many_parts = virtual_requests < kFewCtas / 8, one_part = virtual_requests > kFewCtas / 2;
  bool const few = tiles <= kFewTiles / 2 || (tiles <= kFewTiles && (many_parts || one_part));
  return few && virtual_requests <= kFewCtas ? min_int(grid, kFewCtas) : grid;
}

// How many tiles more than its even share a CTA may have. A CTA alone can draw 1.6 times (H200) to 2.2 times (H100) its
// share of the memory's bandwidth; with long shares what the other cuts cost matters less.
ETAP_HD int most_uneven(int ideal) { return ideal * 5 / 8 + 4; }
ETAP_HD int most_uneven_aligned(int ideal) { return min_int(most_uneven(ideal), ideal / 8 + 12); }

// The number of the CTA with this block index, where `num_ctas` of a grid's CTAs take part; the others come after
// them. A GPU is filled cluster of SMs by cluster, and memory serves the clusters at either half of L2 alike: those
// without work stand evenly among those that have some, or one half's have more to wait for (128 of 132 CTAs: 1.3% of
// 64K keys, measured; 64 of 132, then mostly one to a pair of SMs: 2 to 4% of a short launch). by_grid(n): n / grid.
template <class ByGrid>
ETAP_HD int spread_cta(int block, int num_ctas, int grid, ByGrid&& by_grid) {
  int const before = by_grid(block * num_ctas), rest = block * num_ctas - before * grid;
  return rest + num_ctas >= grid ? before : num_ctas + block - before;
}

// How far a flat cut may move, in tiles, for a merge less (2 to 4 measured alike, 8 slower).
constexpr int kMostSlack = 3;

// Whether, memory being the limit, a second piece in each CTA costs less than what SMs would draw that the aligned cut
// leaves without work: 0.8% of 128 requests of 128K keys, 0.5% of 16. (Of 128 of 32K it loses up to 0.6%, of 16 of 64K
// 0.3%; of 32 rows up to 1.7% at any length.) Measured.
ETAP_HD bool long_shares(int ideal, int virtual_requests, int grid, int row_tile) {
  return row_tile <= 16 && ideal >= (4 * virtual_requests <= grid ? 200 : 600);
}

// Lengths are told apart so far, `longest` being the most tiles: a bin is 1/32 of them or less.
constexpr int kLengthBins = 64;
ETAP_HD int length_bin(int tiles, int longest) {
  while (longest >= kLengthBins) longest >>= 1, tiles >>= 1;
  return tiles;
}

// Whether requests are dealt: one to two a CTA, not about alike, and none much longer than a share; none longer than
// it where shares are longer, for the flat cut's merges weigh less there. Measured.
ETAP_HD bool deals(WorkTotals const& totals, int grid, int ideal) {
  constexpr int kShort = 64, kLong = 192;  // tiles
  int const requests = totals.virtual_requests, most = ideal <= kShort ? ideal * 5 / 4 : ideal <= kLong ? ideal : 0;
  return requests > grid && requests <= 2 * grid && totals.longest <= most &&
         totals.longest > quotient(totals.tiles, requests) * 5 / 4;
}

// Dealt: the rank of a CTA's i-th request. Of 4 CTAs: 0 1 2 3, then 7 6 5 4. Requests without tiles have none.
ETAP_HD int dealt_rank(int num_ctas, int cta, int i) {
  return i % 2 ? (i + 1) * num_ctas - 1 - cta : i * num_ctas + cta;
}

// Shares that may be uneven whatever the limit is, in tiles: what merges and second pieces cost weighs more. Measured.
constexpr int kShortShare = 32;

// ctas_for(share): the sum of aligned_ctas. It may be a warp-wide reduction: every lane calls it alike. `uneven`:
// memory is the limit, not the CTAs; else shares differ by an eighth at most, but short ones. `ranks`: the caller can
// tell which request has a rank by length_bin, and all have one row tile.
template <class CtasFor>
ETAP_HD Plan make_plan(WorkTotals const& totals, int grid, int row_tile, bool uneven, bool ranks, CtasFor&& ctas_for) {
  Plan plan;
  grid = ctas_of(totals.tiles, totals.virtual_requests, grid);
  plan.total_tiles = totals.tiles;
  plan.num_ctas = min_int(grid, totals.tiles);
  plan.share = 0;
  plan.whole = false;
  plan.slack = 0;
  plan.dealt = false;
  if (totals.tiles == 0) return plan;
  int const ideal = quotient_up(totals.tiles, grid);
  uneven = uneven || ideal <= kShortShare;
  bool const equal = totals.longest * totals.virtual_requests == totals.tiles;
  bool const flat = uneven && long_shares(ideal, totals.virtual_requests, grid, row_tile);
  if (!flat && totals.virtual_requests <= grid) {
    int const eighth = max_int(1, ideal / 8), more = uneven ? most_uneven_aligned(ideal) : eighth;
    // The ideal share, then the one that gives every virtual request the same CTAs (always feasible, if it is about as
    // good), then larger ones.
    ETAP_ROLLED
    for (int step = 0; step < 6; ++step) {
      int share = ideal + max_int(0, step - 1) * more / 4;
      if (step == 1) {
        int const alike = quotient_up(totals.longest, quotient(grid, totals.virtual_requests));
        share = min_int(alike, ideal + (equal ? more : eighth));
      }
      int const needed = ctas_for(share);
      if (needed <= grid) {
        plan.num_ctas = needed;
        plan.share = share;
        return plan;
      }
    }
  }
  if (uneven && ranks && deals(totals, grid, ideal)) {
    plan.dealt = true;
    return plan;
  }
  plan.flat = EvenCut(totals.tiles, plan.num_ctas);
  plan.slack = uneven ? min_int(plan.flat.base / 4, kMostSlack) : 0;
  // With less than one and a half each, few CTAs would be at work at the end; of unequal ones some would have far more.
  bool const many = 2 * totals.virtual_requests >= 3 * grid;
  plan.whole = equal && many && uneven && !flat && totals.longest <= most_uneven(ideal);
  return plan;
}

// Quantity whose running sum over requests locates a CTA's first one, and the sum at which the CTA starts: tiles
// (flat) or CTAs (aligned).
ETAP_HD int plan_weight(Plan const& plan, RequestWork w) {
  return plan.share ? aligned_ctas(w, plan.share) : w.tiles * w.row_tiles;
}
ETAP_HD int plan_target(Plan const& plan, int cta) { return plan.share ? cta : plan.flat.begin(cta); }

// Aligned: the one piece of `cta`, which is of this request. `prefix`: CTAs of the requests before it; `ctas`: its own.
ETAP_HD Piece aligned_piece(RequestWork w, int request, int prefix, int ctas, int cta) {
  int const parts = w.row_tiles == 1 ? ctas : quotient(ctas, w.row_tiles);
  EvenCut const cut(w.tiles, parts);
  Piece piece;
  piece.request = request;
  piece.row_tile = w.row_tiles == 1 ? 0 : quotient(cta - prefix, parts);
  piece.first_cta = prefix + piece.row_tile * parts;
  piece.first_slot = 2 * piece.first_cta;
  piece.num_parts = parts;
  piece.part = cta - piece.first_cta;
  piece.begin = cut.begin(piece.part);
  piece.end = cut.begin(piece.part + 1);
  return piece;
}

// Flat: the piece of the virtual request with flat tile `at` that `cta` has; part < 0 or >= num_parts: none, its cuts
// have moved. `prefix`: tiles of the requests before this one.
ETAP_HD Piece flat_piece(Plan const& plan, RequestWork w, int request, int prefix, int cta, int at) {
  Piece piece;
  piece.request = request;
  piece.row_tile = w.row_tiles == 1 ? 0 : quotient(at - prefix, w.tiles);
  int const start = prefix + piece.row_tile * w.tiles, end = start + w.tiles;
  auto const cut = [&](int of) { return plan.cut(plan.flat.begin(of), start, w.tiles); };
  int first = plan.flat.owner(start), last = plan.flat.owner(end - 1);
  if (first < last) {
    bool const later = cut(first + 1) == start, sooner = cut(last) == end;
    first += later, last -= sooner;
  }
  piece.first_cta = first;
  piece.first_slot = 2 * first + 1;
  piece.num_parts = last - first + 1;
  piece.part = cta - first;
  piece.begin = cta == first ? 0 : cut(cta) - start;
  piece.end = cta == last ? w.tiles : cut(cta + 1) - start;
  return piece;
}

// A request of `tiles`, uncut; its first row tile.
ETAP_HD Piece whole_piece(int request, int tiles, int cta) {
  Piece piece;
  piece.request = request;
  piece.begin = 0;
  piece.end = tiles;
  piece.row_tile = 0;
  piece.num_parts = 1;
  piece.part = 0;
  piece.first_cta = cta;
  piece.first_slot = 2 * cta;
  return piece;
}

// Walks the pieces of one CTA. `prefix` is the sum of plan_weight over the requests before `request`.
struct PieceCursor {
  Plan plan;
  int cta, request, prefix;
  int next_tile, end_tile;  // in the line of all tiles; aligned: 0 and 1, then 1 and 1

  PieceCursor() = default;
  ETAP_HD PieceCursor(Plan const& plan_, int cta_, int request_, int prefix_)
      : plan(plan_), cta(cta_), request(request_), prefix(prefix_), next_tile(0), end_tile(cta < plan.num_ctas) {
    if (!plan.share && cta < plan.num_ctas) {
      next_tile = plan.flat.begin(cta);
      end_tile = plan.flat.begin(cta + 1);
    }
  }

  // The next piece, if there is one. work_of(request) gives a RequestWork.
  template <class WorkOf>
  ETAP_HD bool next(WorkOf&& work_of, Piece& piece) {
    ETAP_ROLLED
    while (next_tile < end_tile) {
      int const at = plan.share ? cta : next_tile;
      RequestWork w = work_of(request);
      for (int weight = plan_weight(plan, w); at >= prefix + weight; weight = plan_weight(plan, w)) {
        prefix += weight;
        w = work_of(++request);
      }
      if (plan.share) {
        next_tile = end_tile;
        piece = aligned_piece(w, request, prefix, aligned_ctas(w, plan.share), cta);
        return true;
      }
      if (!plan.whole) {
        piece = flat_piece(plan, w, request, prefix, cta, at);
        int const start = prefix + piece.row_tile * w.tiles;
        bool const has = piece.part >= 0 && piece.part < piece.num_parts;
        next_tile = start + (has ? piece.end : w.tiles);
        if (!has) continue;
        return true;
      }
      int const row_tile = w.row_tiles == 1 ? 0 : quotient(at - prefix, w.tiles), start = prefix + row_tile * w.tiles;
      next_tile = start + w.tiles;
      if (start < at) continue;  // it began before this CTA's share
      piece = whole_piece(request, w.tiles, cta);
      piece.row_tile = row_tile;
      return true;
    }
    return false;
  }
};

}  // namespace etap
