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

import typer

from etap_integration._library import on_hopper
from etap_integration.cli.output import CommandError, MissingError, out, reported

ROOT = Path(__file__).resolve().parents[1]
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


def command(sanitizer: Path, check: str, select: str | None = None) -> list[str]:
    """Its command line: reports of our kernels alone, and exit status 1 if there are any."""
    return [
        str(sanitizer), "--tool", check, *CHECKS[check], "--error-exitcode", "1", "--print-limit", "100",
        "--kernel-name", "kernel_substring=mla_decode",
        sys.executable, "-m", "pytest", "-q", "tests/gpu/test_reduced_gpu.py", *(["-k", select] if select else []),
    ]  # fmt: skip


app = typer.Typer(add_completion=False)


@app.command()
@reported
def main(
    checks: Annotated[list[str] | None, typer.Argument(help="memcheck, racecheck; both if none is named.")] = None,
    select: Annotated[str | None, typer.Option("-k", help="Which problems, as pytest's -k.")] = None,
) -> None:
    """Runs the reduced set under compute-sanitizer. Status 1 if it reports anything, 3 if it could not be run."""
    if unknown := set(checks or ()) - set(CHECKS):
        raise typer.BadParameter(f"checks is {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    sanitizer = find_sanitizer()
    if sanitizer is None:
        raise MissingError("compute-sanitizer is not here: pip install nvidia-cuda-sanitizer-api, or set CUDA_HOME")
    if not on_hopper():  # where the tests would be skipped, and nothing reported
        raise MissingError("needs a Hopper GPU")
    # torch's allocator keeps memory, in which an access past a tensor's end would not be one past an allocation's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for check in checks or CHECKS:
        out.print(f"{check}: {sanitizer}", markup=False)
        if subprocess.run(command(sanitizer, check, select), cwd=ROOT, env=environment).returncode:
            failed.append(check)
    if failed:
        raise CommandError(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    app()
