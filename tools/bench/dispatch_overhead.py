"""Host time of the dispatch, per call: what the stand-in adds between an engine's call and the operator's.

    python tools/bench/dispatch_overhead.py

Needs no GPU and nothing installed: upstream and the operator are functions that do nothing, the tensors lie on the CPU,
and the make-believe machine is a Hopper GPU. So the figures hold the stand-in's own work (arguments, decision, views of
the caches, counting) and leave out both the upstream function's and the operator's host time.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
stubs = importlib.import_module("dispatch_fixtures")
dispatch = importlib.import_module("etap_integration.dispatch")


def nothing(*args: Any, **kwargs: Any) -> Any:
    return (None, None) if kwargs["return_lse"] else None


def idle(module: ModuleType, name: str, signature: str) -> Callable[..., Any]:
    """Upstream's function as a stub that keeps nothing."""
    function = stubs.from_signature(module.__name__, name, signature)
    function.__globals__["calls"] = _Forgetful()
    setattr(module, name, function)
    return function


class _Forgetful:
    def append(self, item: Any) -> None:
        pass


def microseconds(call: Callable[[], Any], rounds: int = 15, repeats: int = 2000) -> tuple[float, float]:
    """Median and fastest of `rounds` means over `repeats` calls."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        found.append((time.perf_counter_ns() - start) / repeats / 1e3)
    return statistics.median(found), min(found)


def main() -> None:
    kvcache, varlen = "flash_attn_with_kvcache", "flash_attn_varlen_func"
    cases = {
        "SGLang, MLA decode": (stubs.SGL, kvcache, stubs.sglang_call()),
        "vLLM, MLA decode": (stubs.VLLM, varlen, stubs.vllm_call()),
        "FA3, MLA decode": (stubs.FA3, kvcache, stubs.kvcache_call()),
        "FA3, MLA decode, left to upstream": (stubs.FA3, kvcache, stubs.kvcache_call(softcap=1.0)),
        "FA3, no MLA call": (stubs.FA3, kvcache, stubs.kvcache_call(qv=None)),
    }
    print(f"{'call':36} {'median us':>10} {'fastest us':>10}   over calling the stub directly")
    for title, (name, function, arguments) in cases.items():
        module = stubs.engine(name)
        original = idle(module, function, stubs.SIGNATURES[name, function])
        direct = microseconds(lambda original=original, arguments=arguments: original(**arguments))
        with dispatch.patched(name, operator=nothing, machine=stubs.hopper, strict=False):
            stand_in = getattr(module, function)
            through = microseconds(lambda stand_in=stand_in, arguments=arguments: stand_in(**arguments))
        print(f"{title:36} {through[0] - direct[0]:10.2f} {through[1] - direct[1]:10.2f}")


if __name__ == "__main__":
    main()
