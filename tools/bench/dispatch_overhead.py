"""Host time of the dispatch, per call.

    python tools/bench/dispatch_overhead.py          # what the stand-in adds; anywhere
    python tools/bench/dispatch_overhead.py --gpu    # whole calls of an installed FlashAttention-3; on a Hopper GPU

The first needs no GPU and nothing installed: upstream and the operator are functions that do nothing, the tensors lie
on the CPU, and the make-believe machine is a Hopper GPU. So its figures hold the stand-in's own work (arguments,
decision, counting) and leave out both the upstream function's and the operator's host time. The second times both
functions whole, from the call to its return, nothing waiting for the GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
stubs = importlib.import_module("dispatch_fixtures")
dispatch = importlib.import_module("etap_integration.dispatch")
ops = importlib.import_module("etap_integration.ops")


def nothing(*args: Any, **kwargs: Any) -> Any:
    """The operator, of a call's first time."""
    return (None, None) if kwargs["return_lse"] else None


def nothing_checked(
    q, qv, k, v, table, lengths, cu, max_q, scale, causal, out, lse_shape, num_ctas, index, *rare
) -> Any:
    """The operator, of arguments known to be good."""
    return None if lse_shape is None else (None, None)


def idle(module: ModuleType, name: str, signature: str) -> Callable[..., Any]:
    """Upstream's function as a stub that keeps nothing."""
    function = stubs.from_signature(module.__name__, name, signature)
    function.__globals__["calls"] = _Forgetful()
    setattr(module, name, function)
    return function


class _Forgetful:
    def append(self, item: Any) -> None:
        pass


def extra_us(call: Callable[[], Any], direct: Callable[[], Any], rounds: int = 300, repeats: int = 50) -> float:
    """Microseconds that `call` takes over `direct`: the difference of the 10% quantiles of their means.

    They take turns, in rounds so short that some have the CPU to themselves.
    """

    def mean(one: Callable[[], Any]) -> float:
        start = time.perf_counter_ns()
        for _ in range(repeats):
            one()
        return (time.perf_counter_ns() - start) / repeats / 1e3

    turns = [(mean(call), mean(direct)) for _ in range(rounds)]
    through, without = (sorted(times)[rounds // 10] for times in zip(*turns, strict=True))
    return through - without


def on_gpu() -> None:
    """Host time of flash_attn_with_kvcache, by upstream, patched where it is, and under the monkeypatch."""
    torch = importlib.import_module("torch")
    fa3 = importlib.import_module("flash_attn_interface")
    library = ctypes.CDLL(sys.modules["flash_attn_3._C"].__file__)
    patched = hasattr(library, "etap_fa3_mode")
    move = lambda x: x.cuda() if isinstance(x, torch.Tensor) else x  # noqa: E731
    cases = {
        "SGLang's arguments": {k: move(v) for k, v in stubs.sglang_call(q_lens=(1,) * 16).items() if k != "ver"},
        "FA3's arguments": {k: move(v) for k, v in stubs.kvcache_call(batch=4).items()},
        "left to upstream": {k: move(v) for k, v in stubs.kvcache_call(batch=4, heads=64).items()},
    }

    def call(arguments: dict[str, Any]) -> float:
        def some() -> None:
            for _ in range(50):  # few enough for the launch queue
                fa3.flash_attn_with_kvcache(**arguments)

        found = []
        for _ in range(25):
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            some()
            found.append((time.perf_counter_ns() - start) / 50 / 1e3)
        return statistics.median(found)

    print(f"{'host time, us':24} {'upstream':>10} {'patched':>10} {'monkeypatch':>12}")
    for title, arguments in cases.items():
        arguments.pop("scheduler_metadata", None)
        arguments.update(num_splits=0)
        times = []
        with torch.inference_mode():
            if patched:
                library.etap_fa3_set_mode(0)
                times.append(call(arguments))
                library.etap_fa3_set_mode(2)
            upstreams = call(arguments)
            with dispatch.patched("flash_attn_interface", strict=False):
                through = call(arguments)
        shown = f"{times[0]:10.2f}" if times else f"{'-':>10}"
        print(f"{title:24} {upstreams:10.2f} {shown} {through:12.2f}")


def main() -> None:
    kvcache, varlen = "flash_attn_with_kvcache", "flash_attn_varlen_func"
    cases = {
        "SGLang, MLA decode": (stubs.SGL, kvcache, stubs.sglang_call()),
        "vLLM, MLA decode": (stubs.VLLM, varlen, stubs.vllm_call()),
        "FA3, MLA decode": (stubs.FA3, kvcache, stubs.kvcache_call()),
        "FA3, MLA decode, left to upstream": (stubs.FA3, kvcache, stubs.kvcache_call(softcap=1.0)),
        "FA3, no MLA call": (stubs.FA3, kvcache, stubs.kvcache_call(qv=None)),
    }
    print(f"{'call':36} {'us':>8}   over calling the stub directly")
    for title, (name, function, arguments) in cases.items():
        module = stubs.engine(name)
        original = idle(module, function, stubs.SIGNATURES[name, function])
        ops.mla_decode, ops.mla_decode_checked = nothing, nothing_checked
        with dispatch.patched(name, machine=stubs.hopper, strict=False):
            stand_in = getattr(module, function)
            extra = extra_us(partial(stand_in, **arguments), partial(original, **arguments))
        print(f"{title:36} {extra:8.2f}")


if __name__ == "__main__":
    on_gpu() if "--gpu" in sys.argv[1:] else main()
