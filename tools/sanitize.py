"""The reduced set of GPU tests under compute-sanitizer: `python -m tools.sanitize`, on a Hopper GPU.

memcheck looks at all accesses, racecheck at those to shared memory that nothing orders. What racecheck cannot see is
what TMA and wgmma read and write; the interpreter (tools/interpreter) watches these. compute-sanitizer comes with the
CUDA toolkit, or in the package nvidia-cuda-sanitizer-api.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = 3
CHECKS = {
    "memcheck": [],
    "racecheck": ["--racecheck-report", "analysis", "--racecheck-detect-level", "warn"],
}


def find_sanitizer() -> Path | None:
    """compute-sanitizer on the path, of the toolkit, or of the package."""
    if found := shutil.which("compute-sanitizer"):
        return Path(found)
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if spec := find_spec("nvidia"):
        places += [p for base in spec.submodule_search_locations or () for p in Path(base).glob("*/compute-sanitizer")]
    return next((p / "compute-sanitizer" for p in places if (p / "compute-sanitizer").is_file()), None)


def has_hopper() -> bool:
    """Whether the tests would run."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def command(sanitizer: Path, check: str, select: str | None = None) -> list[str]:
    """Its command line: reports of our kernels alone, and exit status 1 if there are any."""
    return [
        str(sanitizer), "--tool", check, *CHECKS[check], "--error-exitcode", "1", "--print-limit", "100",
        "--kernel-name", "kernel_substring=mla_decode",
        sys.executable, "-m", "pytest", "-q", "tests/gpu/test_reduced_gpu.py", *(["-k", select] if select else []),
    ]  # fmt: skip


app = typer.Typer(add_completion=False)


@app.command()
def main(
    checks: Annotated[list[str] | None, typer.Argument(help="memcheck, racecheck; both if none is named.")] = None,
    select: Annotated[str | None, typer.Option("-k", help="Which problems, as pytest's -k.")] = None,
) -> None:
    """Runs the reduced set under compute-sanitizer. Status 1 if it reports anything, 3 if it could not be run."""
    if unknown := set(checks or ()) - set(CHECKS):
        raise typer.BadParameter(f"checks is {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    sanitizer = find_sanitizer()
    if sanitizer is None:
        typer.echo("not run: compute-sanitizer is not here: pip install nvidia-cuda-sanitizer-api, or set CUDA_HOME")
        raise typer.Exit(NOT_RUN)
    if not has_hopper():  # where the tests would be skipped, and nothing reported
        typer.echo("not run: no Hopper GPU")
        raise typer.Exit(NOT_RUN)
    # torch's allocator keeps memory, in which an access past a tensor's end would not be one past an allocation's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for check in checks or CHECKS:
        typer.echo(f"{check}: {sanitizer}")
        if subprocess.run(command(sanitizer, check, select), cwd=ROOT, env=environment).returncode:
            failed.append(check)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
