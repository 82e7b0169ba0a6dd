"""PTX instructions on the critical path of a short launch: `python -m tools.interpreter.path`.

By in-kernel clocks, some 250 instructions of one warp are a microsecond (docs/kernel-log.md), so what a short launch
takes beyond waiting for memory is counted here, without a GPU: 16 rows, 64 tiles of keys, one a CTA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from tools import etap_build
from tools.interpreter import build
from tools.interpreter.implementation import Interpreted

Milestones = Sequence[tuple[int, int, str]]
"""(warp, instructions it has executed, instruction), in order of execution."""

_CONSUMERS = range(4, 8)  # of warpgroup 0, which has the tile


def milestones(module: ModuleType, batch: int = 16, seed: int = 0, cta: int = 45) -> Milestones:
    """Those of one CTA of the 64 (of 132) that have a tile each; `batch` divides 64."""
    generator = torch.Generator().manual_seed(seed)
    pages_each, page = 64 // batch, 64
    cache = torch.randn(batch * pages_each, page, 576, generator=generator).bfloat16()
    query = torch.randn(batch, 1, 16, 576, generator=generator).bfloat16()
    table = torch.randperm(batch * pages_each, generator=generator).int().view(batch, -1)
    lengths = torch.full((batch,), pages_each * page, dtype=torch.int32)
    out, lse = torch.empty(batch, 1, 16, 512, dtype=torch.bfloat16), torch.empty(batch, 16, 1)
    module.watch(cta)
    try:
        Interpreted(module, seed=seed, sms=132, check_races=False)(
            query[..., :512].contiguous(), query[..., 512:].contiguous(), cache[..., :512], cache[..., 512:], table,
            lengths, None, 1, 576**-0.5, False, out, lse, 0, 2,
        )  # fmt: skip
        return module.milestones()
    finally:
        module.watch(-1)


def _of(found: Milestones, warp: int) -> list[tuple[int, str]]:
    return [(executed, text) for w, executed, text in found if w == warp]


def _first(found: list[tuple[int, str]], matches: Callable[[str], bool], after: int = 0) -> int:
    return next(executed for executed, text in found if executed >= after and matches(text))


def _last(found: list[tuple[int, str]], matches: Callable[[str], bool], before: int) -> int:
    return max(executed for executed, text in found if executed < before and matches(text))


def stages(found: Milestones) -> dict[str, int]:
    """Instructions of each stage; of the consumers, the warp that had to poll least."""
    bar = lambda text: text.startswith("bar.") and not text.startswith("bar.warp")  # noqa: E731
    planner = _of(found, 0)
    planned = _first(planner, bar)
    counts = {
        "plan": planned,
        "first copy": _first(planner, lambda text: text.startswith("cp.async.bulk")) - planned,
    }
    for warp in _CONSUMERS:
        mine = _of(found, warp)
        prefetched = _first(mine, lambda text: text.startswith("mbarrier.try_wait"))
        asked = _first(mine, lambda text: text.startswith("ld.global.nc"), prefetched)
        there = _first(mine, bar, asked)
        computed = _last(mine, lambda text: text.startswith("wgmma.wait_group"), 1 << 60)
        stored = _last(mine, lambda text: text.startswith("st.relaxed"), 1 << 60)
        merging = _first(mine, bar, stored)
        statistics = _first(mine, bar, merging + 1)
        end = mine[-1][0]
        own = {
            "first page": _last(mine, lambda text: text.startswith("ld.global"), prefetched),
            "query asked for": asked - _last(mine, lambda text: text.startswith("mbarrier.try_wait"), asked),
            "query stored": there - asked,
            "results stored": stored - computed,
            "merge": end - statistics,
        }
        counts.update({name: min(n, counts.get(name, n)) for name, n in own.items()})
    return counts


def counted(module: ModuleType, batch: int = 16, schedules: int = 3) -> dict[str, int]:
    """The least of each stage over some schedules: in some, results come late, and the merge looks for them again."""
    runs = [stages(milestones(module, batch, seed)) for seed in range(schedules)]
    return {name: min(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    """Prints the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, choices=[1, 2, 4, 8, 16, 32, 64], help="default 16")
    batch = parser.parse_args().batch
    for name, count in counted(build.load(etap_build.ROOT / "build/interpreter"), batch).items():
        print(f"{name:16} {count:6}")


if __name__ == "__main__":
    main()
