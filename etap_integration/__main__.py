"""`python -m etap_integration`: what is built here, what would run, and what the pipeline's numerics are worth.

On a Hopper GPU with the operator library and the benchmark at hand (a checkout), it also times the operator against the
memory floor, FlashAttention-3 and FlashInfer: those of them whose libraries `python -m tools.bench build-rivals` built.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import torch

from etap_integration import _library, numerics


def print_build() -> bool:
    """Prints the build report; returns whether the operator can be loaded."""
    info = _library.build_info()
    library = info["library"]
    print(f"etap_integration {info['version']}, torch {torch.__version__}")
    print(f"operator library: {'loaded' if library['loaded'] else library['reason']}")
    for name, kernel in sorted(info["kernels"].items()):
        spilled = kernel["spill_stores"] + kernel["spill_loads"]
        print(f"  {kernel['registers']} registers at entry, {spilled} B spilled: {name}")
    return bool(library["loaded"])


def print_configurations() -> None:
    """Prints the tile configurations and how a batch is divided, where the host module is built."""
    try:
        host = _library.host_module()
    except RuntimeError as error:
        print(f"host module: {error}")
        return
    for c in host.kernel_configs():
        s, o = c["wgmma_n"]
        print(
            f"{c['cache']} cache, up to {c['row_tile']:2} rows, P in {c['p_parts']}: wgmma m64n{s}k16 for S^T, m64n{o}k16 for O^T, "
            f"{c['ring_chunks']} ring chunks, {c['smem_bytes']} B of shared memory"
        )
    work = [pieces for pieces in host.cta_work([65536] * 16, None, 16, 16, 132) if pieces]
    tiles = [sum(p[3] - p[2] for p in pieces) for pieces in work]
    print(f"16 requests of 64K keys on 132 SMs: {len(work)} CTAs of {min(tiles)} to {max(tiles)} tiles")


def main() -> int:
    """Runs the command; returns the exit code."""
    loaded = print_build()
    print_configurations()
    numerics.main()
    if not (loaded and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9):
        print("no timing: that takes a Hopper GPU and the operator library")
        return 0
    if importlib.util.find_spec("tools.bench") is None:
        print("no timing: run this from a checkout, which holds tools/bench")
        return 0
    return subprocess.run([sys.executable, "-m", "tools.bench", "run", "--grid", "bars"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
