"""The cost of an MLA decode step, from first principles and a few measured constants. Plain Python: no torch, no GPU.

    predict(problem, gpu, implementation)   tensor-core, shared-memory and memory time, and the time of the whole call
    compare(problem, gpu)                   every implementation, and which one is expected to win
    upstream_wins(rows, batch, kv_len, sms) what the dispatcher asks

The model of one call: its 64-key tiles are dealt to the SMs as the implementation's own scheduler deals them. The SM
with the most tiles needs, for each, the issue time of the tile's wgmma instructions; all SMs together need the time
to stream the KV bytes; one SM cannot stream faster than it can. The slowest of these, plus a constant for launch,
scheduling and merge, is the time. An instruction m64nNk16 takes the longer of its tensor-core and its shared-memory
time, which is what makes N below 64 not quite free, and M = 64 with 16 useful rows four times too dear.

Times are in microseconds and mean what `tools.bench` measures: cold L2, launch included, called eagerly.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

TILE = 64  # keys
D_QK, D_V = 576, 512
KV_BYTES = {"bf16": 2, "fp16": 2, "e4m3": 1}

# ---------------------------------------------------------------------------------------------------------------------
# GPUs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU.

    Attributes:
        name: as printed.
        sms: streaming multiprocessors.
        clock_ghz: clock at which the vendor states the tensor rate.
        stream_tb_s: rate at which long reads stream, in TB/s: on an H200 measured, 0.98 of the vendor's 4.8; elsewhere
            0.98 of the vendor's figure.
        tensor_slowdown: 1 with the full Hopper tensor core (4,096 dense 16-bit FLOP a cycle and SM), 4 on an H20.
        throttled: an H200 that imitates the H20 by issuing each wgmma several times.
    """

    name: str
    sms: int
    clock_ghz: float
    stream_tb_s: float
    tensor_slowdown: int = 1
    throttled: bool = False

    def tensor_cycles(self, n: int) -> float:
        """Tensor-core cycles of one 16-bit wgmma m64n`n`k16 on one SM."""
        return n / 2 * self.tensor_slowdown

    def wgmma_cycles(self, n: int) -> float:
        """Cycles between two such instructions: 18, 20, 24, 32 for N = 8, 16, 32, 64 at the full tensor rate."""
        if self.throttled:
            return throttle_factor(n) * max(smem_cycles(n), n / 2)
        return max(smem_cycles(n), self.tensor_cycles(n))


def smem_cycles(n: int) -> float:
    """Cycles in which shared memory, at 128 bytes a cycle, delivers the operands of one m64n`n`k16: 64 x 16 and
    n x 16 values of 16 bits. These are the issue rates measured on an H200 for N = 8 to 64."""
    return (64 + n) * 16 * 2 / 128


def throttle_factor(n: int) -> int:
    """How often the emulated H20 issues a 16-bit wgmma of width `n`."""
    return 1 if n <= 8 else 2 if n <= 16 else 3 if n <= 32 else 4


_STREAM = 0.98  # of the vendor's memory rate, as measured on an H200
GPUS: dict[str, Gpu] = {
    "h20": Gpu("H20", 78, 1.85, 4.0 * _STREAM, tensor_slowdown=4),
    "h100": Gpu("H100 SXM", 132, 1.83, 3.35 * _STREAM),
    "h800": Gpu("H800 SXM", 132, 1.83, 3.35 * _STREAM),
    "h200": Gpu("H200", 132, 1.83, 4.8 * _STREAM),
    "h20-emulated": Gpu("H20 emulated on an H200", 78, 1.83, 4.32, tensor_slowdown=4, throttled=True),
}
SM_STREAM_TB_S = 4.32 / 78  # what one SM was seen to stream when 78 share an H200's memory
LAUNCH_US = 4.8  # of any kernel, from the memory floor at short lengths
FLUSH_MB = 44.0  # dirty lines that a call with a cold L2 evicts before its reads run free
FLUSH_SHARE = 0.546  # such lines per byte read, until there are no more
EVICT_FIRST_MB = 188.7  # of cache that a launch of ours reads with evict-first at most (kEvictFirstBytes)
FAR_MB = 1200.0  # cache beyond which FlashInfer slows down (see `Implementation.far`)


def gpu(name: str) -> Gpu:
    """The GPU called `name`: a key of `GPUS`, in any case.

    Raises ValueError naming those there are.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise ValueError(f"gpu: {name!r} is unknown; there are {', '.join(GPUS)}")
    return found


def gpu_of(
    name: str, sms: int, clock_ghz: float | None = None, memory_clock_ghz: float | None = None, bus_bits: int = 0
) -> Gpu:
    """The model of a device from what its driver reports.

    A known product (by `name` and `sms`) has its table entry; another one is scaled from the clocks and the bus width,
    and where those are missing has an H200's.

    Args:
        name: the device's name; sms: its SMs.
        clock_ghz: largest SM clock; memory_clock_ghz: memory clock, data moving on both edges; bus_bits: bus width.
    """
    words = name.upper().replace("-", " ").split()
    for key in ("H20", "H200", "H100", "H800"):
        known = GPUS[key.lower()]
        if key in words and sms == known.sms:
            return known
    base = GPUS["h20"] if sms == GPUS["h20"].sms else GPUS["h200"]
    stream = 2 * memory_clock_ghz * bus_bits / 8 / 1e3 * _STREAM if memory_clock_ghz and bus_bits else base.stream_tb_s
    clock = min(clock_ghz, base.clock_ghz) if clock_ghz else base.clock_ghz
    return replace(base, name=name, sms=sms, stream_tb_s=stream, clock_ghz=clock)


# ---------------------------------------------------------------------------------------------------------------------
# Problems and pipelines
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One decode step of MLA: `batch` requests of `kv_len` keys, `heads` query heads, `q_len` query tokens each.

    Raises ValueError for a number below 1 (`kv_len`: below 0) or an unknown `kv_dtype`.
    """

    batch: int
    kv_len: int
    heads: int = 16
    q_len: int = 1
    page_size: int = 64
    kv_dtype: str = "bf16"

    def __post_init__(self) -> None:
        for name, low in (("batch", 1), ("kv_len", 0), ("heads", 1), ("q_len", 1), ("page_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least {low}")
        if self.kv_dtype not in KV_BYTES:
            raise ValueError(f"kv_dtype: {self.kv_dtype!r}, expected one of {', '.join(KV_BYTES)}")

    @property
    def rows(self) -> int:
        """Query rows of the KV head: heads times query tokens."""
        return self.heads * self.q_len

    @property
    def tiles(self) -> int:
        """64-key tiles of one request."""
        return -(-self.kv_len // TILE)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache that have to be read."""
        return self.batch * self.kv_len * D_QK * KV_BYTES[self.kv_dtype]

    @property
    def flop(self) -> int:
        """Useful floating-point operations."""
        return 2 * self.batch * self.kv_len * self.rows * (D_QK + D_V)


@dataclass(frozen=True)
class Instructions:
    """The wgmma of one 64-key tile: `count` instructions m64n`n`k16 for the scores and for the output.

    useful: share of their multiply-adds that belong to real query rows. passes: how often the tile is worked on.
    """

    scores: tuple[int, int]
    output: tuple[int, int]
    useful: float
    passes: int = 1

    def cycles(self, cost: Callable[[int], float]) -> float:
        """Sum of `cost(n)` over the instructions."""
        return sum(count * cost(n) for count, n in (self.scores, self.output))


def query_major_tile(rows: int) -> Instructions:
    """S = Q K^T and O = P V: query rows on M, padded to a multiple of 64; one 64 x 64 and two 64 x 256 accumulators."""
    blocks = -(-rows // 64)
    return Instructions((blocks * D_QK // 16, 64), (blocks * 2 * TILE // 16, 256), rows / (64 * blocks), blocks)


def transposed_tile(rows: int, p_parts: int = 1, row_tile: int = 32) -> Instructions:
    """S^T = K Q^T and O^T = V^T P^T: keys and latent columns on M, query rows on N, padded to 8, 16 or `row_tile`.

    Above `row_tile` rows the tile is worked on more than once. `p_parts` 2 doubles the N of the second product.
    """
    passes = -(-rows // row_tile)
    n = next(size for size in (8, 16, 32, 64) if size * passes >= rows)
    useful = rows * (D_QK + D_V) / (passes * n * (D_QK + p_parts * D_V))
    scores, output = D_QK // 16, D_V // 64 * TILE // 16
    return Instructions((passes * scores, n), (passes * output, p_parts * n), useful, passes)


def etap_tile(rows: int, p_parts: int | None = None, kv_dtype: str = "bf16") -> Instructions:
    """Our kernel's tile. `p_parts` by default as the operator has it on an H200: 2, but 1 with an e4m3 cache, whose
    tiles have 32 rows at most.

    `transposed_tile`, whichever way the two warpgroups share the work: each instruction is issued by one of them. P's
    parts stand side by side on N up to 32 rows, 16 with an e4m3 cache; with more they are accumulated in turn.
    Counted, not measured.
    """
    e4m3 = kv_dtype == "e4m3"
    parts = p_parts or (1 if e4m3 else 2)
    tile = transposed_tile(rows, parts, 32 if e4m3 else 64)
    n = tile.scores[1]
    if parts == 2 and n > (16 if e4m3 else 32):
        tile = replace(tile, output=(2 * tile.output[0], n))
    return tile


# How each scheduler deals the tiles: how many the most loaded SM gets, and the partial results of one request.


def even_share(p: Problem, sms: int) -> tuple[int, float]:
    """Equal contiguous shares of all tiles."""
    return -(-p.batch * p.tiles // sms), min(sms / p.batch, p.tiles)


def etap_share(p: Problem, sms: int) -> tuple[int, float]:
    """Equal contiguous shares; of few tiles 64 SMs have all (`ctas_of` in csrc/etap/schedule.h)."""
    tiles = p.batch * p.tiles
    few = tiles <= 256 or (tiles <= 512 and not 8 <= p.batch <= 32)
    return even_share(p, min(sms, 64) if few and p.batch <= 64 else sms)


def fa3_share(p: Problem, sms: int) -> tuple[int, float]:
    """FlashAttention-3: tiles an SM, with a tenth to spare, set the splits of a request; whole splits go to SMs."""
    if p.tiles == 0:
        return 0, 0
    per_sm = math.ceil(p.batch * p.tiles * 1.1 / sms)
    splits = -(-p.tiles // per_sm)
    return -(-p.tiles // splits) * -(-p.batch * splits // sms), splits


def flashinfer_share(p: Problem, sms: int) -> tuple[int, float]:
    """FlashInfer: chunks of a rounded length, each given to the SM with the least work so far."""
    if p.kv_len == 0:
        return 0, 0
    mean = -(-p.batch * p.kv_len // sms)
    limit = next((size for bound, size in ((8, 32), (16, 64), (32, 128), (64, 192)) if mean <= bound), 0)
    limit = limit or -(-mean // 256) * 256
    loads = [0] * sms
    for _ in range(p.batch):
        for start in range(0, p.kv_len, limit):
            heapq.heapreplace(loads, loads[0] + min(limit, p.kv_len - start))
    return -(-max(loads) // TILE), -(-p.kv_len // limit)


@dataclass(frozen=True)
class Implementation:
    """A kernel: how it works on a tile, how it shares work, and constants that were measured, not derived.

    Attributes:
        name: key and label.
        tile: rows -> wgmma of one tile.
        share: (problem, SMs) -> tiles of the most loaded SM, partial results of a request.
        fixed_us: what a call costs beside the memory floor's launch: scheduling and combine kernels, pipeline fill.
        memory: share of the streaming rate it reaches; tensor: share of the wgmma issue rate it reaches.
        partial_us: merge cost for each partial result of a request; row_us: cost of each query row from 17 to 32.
        reread: share of the memory time that working on a tile once more adds.
        small_page: factor on the memory time with a page size below 8.
        tile_cycles: rows, kv_dtype -> cycles that a tile takes at least, as measured: to widen e4m3, or where its steps
            come one behind the other; 0: what its instructions take. None: it has no kernel for such a cache.
        e4m3_fixed_us, e4m3_memory, e4m3_small_page: for an e4m3 cache: more fixed_us; as `memory` and `small_page`.
        evict_first: share of the dirty lines that it leaves in L2, up to EVICT_FIRST_MB.
        far: share of the memory time that each doubling of the cache beyond FAR_MB adds.
    """

    name: str
    tile: Callable[[int], Instructions]
    share: Callable[[Problem, int], tuple[int, float]]
    fixed_us: float
    memory: float
    tensor: float
    partial_us: float = 0.0
    row_us: float = 0.0
    reread: float = 0.0
    small_page: float = 1.0
    tile_cycles: Callable[[int, str], float | None] = lambda rows, kv_dtype: None if kv_dtype == "e4m3" else 0
    e4m3_fixed_us: float = 0.0
    e4m3_memory: float = 0.9
    e4m3_small_page: float = 1.1
    evict_first: float = 0.0
    far: float = 0.0


# fixed_us, memory, row_us, partial_us, small_page: from one H200 (docs/kernel-log.md); ETAP's fixed_us and row_us from
# an H100 with v16, which fits what v15 took on an H200 within 5%, too. tensor: FlashAttention-3's, FlashInfer's and the
# two published kernels' from their H20 throughput in arXiv:2506.01969, ETAP's from the emulated H20. reread: from one
# measurement, 64 rows at 4K in two tiles of 32. evict_first: v21, 16 requests of 4K on an H200 and an H100.
# tile_cycles: v23, 128 requests of 32K keys with 64 rows; v22, 16 of 64K of e4m3 with 32. ETAP's partial_us: v22, one
# request of 32K. FlashInfer's e4m3 kernel: 16 requests of 2K and 64K. far: FlashInfer in three runs on an H200 (v21 to
# v23) and three on an H100; why is not known.


def _etap_cycles(rows: int, kv_dtype: str) -> float:
    if kv_dtype == "e4m3":
        return 3_000 if rows > 16 else 1_850
    return 5_600 if rows > 32 else 0


FA3 = Implementation(
    "fa3", query_major_tile, fa3_share, 12.1, 0.948, 0.93, partial_us=0.045, row_us=0.2, small_page=1.04
)
FLASHINFER = Implementation(
    "flashinfer", query_major_tile, flashinfer_share, 8.9, 0.92, 0.88, partial_us=0.2, row_us=0.1, small_page=1.1,
    tile_cycles=lambda rows, kv_dtype: 12_100 if kv_dtype == "e4m3" else 0, e4m3_fixed_us=38, far=0.02,
)  # fmt: skip
QUERY_MAJOR = Implementation("query-major", query_major_tile, even_share, 9.0, 0.86, 0.90)
PUBLISHED = Implementation("published-etap", transposed_tile, even_share, 11.0, 0.945, 0.65)
ETAP = Implementation(
    "etap", etap_tile, etap_share, 5.6, 0.955, 0.90, partial_us=0.03, row_us=0.17, reread=0.35, small_page=1.03,
    tile_cycles=_etap_cycles, e4m3_memory=0.88, e4m3_small_page=1.4, evict_first=0.3,
)  # fmt: skip
IMPLEMENTATIONS: dict[str, Implementation] = {i.name: i for i in (FA3, FLASHINFER, QUERY_MAJOR, PUBLISHED, ETAP)}
UPSTREAMS = ("fa3", "flashinfer")


# ---------------------------------------------------------------------------------------------------------------------
# Predictions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Predicted times of one call in microseconds.

    Attributes:
        tensor_us, smem_us: the tensor cores and shared memory of the most loaded SM, busy without a gap.
        hbm_us: the memory floor: launch and the KV bytes at the streaming rate, with a cold L2.
        total_us: the call. bound: "tensor", "memory" or "SM stream", whichever sets it.
        tflop_s: useful TFLOP/s that makes. useful: share of the tensor work that is not padding.
    """

    implementation: str
    tensor_us: float
    smem_us: float
    hbm_us: float
    total_us: float
    bound: str
    tflop_s: float
    useful: float

    @property
    def floor_multiple(self) -> float:
        """total_us over the memory floor."""
        return self.total_us / self.hbm_us


def _flush_us(problem: Problem, device: Gpu) -> float:
    """What writing back dirty lines adds to the memory floor with a cold L2."""
    return min(FLUSH_SHARE * problem.kv_bytes / 1e6, FLUSH_MB) / device.stream_tb_s


def floor_us(problem: Problem, device: Gpu) -> float:
    """The memory floor: launch, and the KV bytes once, with a cold L2 whose dirty lines are written back meanwhile."""
    return LAUNCH_US + problem.kv_bytes / 1e6 / device.stream_tb_s + _flush_us(problem, device)


def predict(problem: Problem, device: Gpu, implementation: Implementation, p_parts: int | None = None) -> Estimate:
    """The cost of one call.

    Args:
        problem, device, implementation: what, where, by which kernel.
        p_parts: 16-bit parts of P in the `etap` kernel; None: what the operator has, 1 on an H20, else as `etap_tile`.

    Raises ValueError where the implementation has no kernel for the problem's cache.
    """
    i, wide = implementation, problem.kv_dtype != "e4m3"
    measured_cycles = i.tile_cycles(problem.rows, problem.kv_dtype)
    if measured_cycles is None:
        raise ValueError(f"{i.name} has no kernel for an {problem.kv_dtype} cache")
    instructions = i.tile(problem.rows)
    if i.name == "etap":
        instructions = etap_tile(problem.rows, p_parts or (1 if device.tensor_slowdown > 1 else None), problem.kv_dtype)
    tiles, partials = i.share(problem, device.sms)
    tile_bytes = TILE * D_QK * KV_BYTES[problem.kv_dtype]
    per_tile = max(instructions.cycles(device.wgmma_cycles) / i.tensor, measured_cycles)
    microseconds = tiles / device.clock_ghz / 1e3
    floor = floor_us(problem, device)
    stream = problem.kv_bytes / 1e6 / device.stream_tb_s
    gathered, rate = (i.small_page, i.memory) if wide else (i.e4m3_small_page, i.e4m3_memory)
    again = (gathered if problem.page_size < 8 else 1.0) * (1 + i.reread * (instructions.passes - 1))
    again *= 1 + i.far * math.log2(max(1.0, problem.kv_bytes / 1e6 / FAR_MB))
    evicts_first = problem.kv_bytes / 1e6 <= EVICT_FIRST_MB and instructions.passes == 1
    spared = i.evict_first * _flush_us(problem, device) if evicts_first else 0.0
    candidates = {
        "tensor": per_tile * microseconds,
        "memory": floor - LAUNCH_US + stream * (again / rate - 1) - spared,
        "SM stream": tiles * tile_bytes * again / 1e6 / SM_STREAM_TB_S,
    }
    bound = max(candidates, key=lambda name: candidates[name])
    rows = max(0, min(problem.rows, 32) - 16)
    fixed = i.fixed_us + (0.0 if wide else i.e4m3_fixed_us)
    total = LAUNCH_US + fixed + candidates[bound] + i.partial_us * partials + i.row_us * rows
    tensor = instructions.cycles(device.tensor_cycles) * microseconds
    smem = (instructions.cycles(smem_cycles) + tile_bytes / 128) * microseconds
    return Estimate(i.name, tensor, smem, floor, total, bound, problem.flop / total / 1e6, instructions.useful)


@dataclass(frozen=True)
class Comparison:
    """All estimates of one problem on one GPU.

    winner: of `etap` and the upstreams. speedup: the better upstream's time over ETAP's, below 1 where upstream wins.
    """

    problem: Problem
    gpu: Gpu
    estimates: dict[str, Estimate]
    winner: str
    speedup: float


def compare(problem: Problem, device: Gpu, names: Sequence[str] | None = None) -> Comparison:
    """Estimates of every implementation (or `names`) that has a kernel for the problem.

    Raises ValueError for an unknown name, or where neither upstream is among them.
    """
    estimates = {}
    for name in names or IMPLEMENTATIONS:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation: {name!r} is unknown; there are {', '.join(IMPLEMENTATIONS)}")
        if IMPLEMENTATIONS[name].tile_cycles(problem.rows, problem.kv_dtype) is not None:
            estimates[name] = predict(problem, device, IMPLEMENTATIONS[name])
    rivals = [estimates[name].total_us for name in UPSTREAMS if name in estimates]
    if not rivals or "etap" not in estimates:
        raise ValueError(f"names: {list(estimates)}, expected etap and at least one of {', '.join(UPSTREAMS)}")
    contest = {name: estimates[name].total_us for name in (*UPSTREAMS, "etap") if name in estimates}
    winner = min(contest, key=lambda name: contest[name])
    return Comparison(problem, device, estimates, winner, min(rivals) / estimates["etap"].total_us)


MARGIN = 1.05
"""A call is left to upstream where ETAP is predicted slower by more than this: the model is not better than that."""


@functools.lru_cache(maxsize=4096)
def upstream_wins(rows: int, batch: int, kv_len: int, sms: int) -> bool:
    """Whether FlashAttention-3 is predicted clearly faster than ETAP, for a 16-bit cache on a GPU with `sms` SMs.

    A GPU with an H20's number of SMs counts as one, any other as an H200. Without SMs, batch or keys: False.
    """
    if min(rows, batch, kv_len, sms) < 1:
        return False
    device = GPUS["h20"] if sms == GPUS["h20"].sms else replace(GPUS["h200"], sms=sms)
    problem = Problem(batch, kv_len, heads=rows)
    return predict(problem, device, ETAP).total_us > MARGIN * predict(problem, device, FA3).total_us
