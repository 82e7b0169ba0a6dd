"""Building the patched FlashAttention-3 with upstream's own ``setup.py``, for a chosen set of kernels."""

from __future__ import annotations

import collections
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import locations, series
from .errors import BuildError, UnknownNameError
from .manifest import Release

BuildProgress = Callable[[int, int, str], None]

# Upstream's feature switches; each kernel set lists what it leaves out.
_NOT_MLA = ("BACKWARD", "FP8", "CLUSTER", "SM80", "HDIM96", "HDIM128", "HDIM192", "HDIM256", "HDIMDIFF192")
_SWITCHES = (
    *_NOT_MLA,
    *("SPLIT", "PAGEDKV", "APPENDKV", "LOCAL", "SOFTCAP", "PACKGQA", "FP16", "VARLEN", "HDIM64", "HDIMDIFF64"),
)

KERNEL_SETS: dict[str, tuple[str, ...]] = {
    # MLA decode: what ETAP runs, and upstream's kernels for the plain calls it leaves to them.
    "mla-decode": (*_NOT_MLA, "LOCAL", "SOFTCAP", "APPENDKV"),
    "mla-decode-bf16": (*_NOT_MLA, "LOCAL", "SOFTCAP", "APPENDKV", "FP16"),
    # The same with upstream's kernels for every MLA call: windows, soft-capping, appending.
    "mla": _NOT_MLA,
    # MLA and grouped-query decode of head dimension 128.
    "decode": ("BACKWARD", "FP8", "CLUSTER", "SM80", "HDIM96", "HDIM192", "HDIM256", "HDIMDIFF192", "SOFTCAP"),
    "full": (),
}


@dataclass(frozen=True)
class BuildResult:
    """The wheel that was built, and the log of the build."""

    wheel: Path
    log: Path


def build_environment(kernels: str, csrc: Path, jobs: int | None, base: Mapping[str, str]) -> dict[str, str]:
    """Environment of upstream's build for one kernel set.

    Args:
        kernels: a key of `KERNEL_SETS`.
        csrc: ETAP's device library.
        jobs: compile jobs in parallel (default: ninja's choice).
        base: environment to start from; its feature switches are replaced.

    Raises:
        UnknownNameError: there is no such kernel set.
        BuildError: `jobs` is not positive.
    """
    if kernels not in KERNEL_SETS:
        raise UnknownNameError("kernels", kernels, KERNEL_SETS)
    if jobs is not None and jobs < 1:
        raise BuildError(f"jobs={jobs}: must be at least 1")
    environment = {k: v for k, v in base.items() if not k.startswith("FLASH_ATTENTION_DISABLE_")}
    for switch in _SWITCHES:
        environment[f"FLASH_ATTENTION_DISABLE_{switch}"] = "TRUE" if switch in KERNEL_SETS[kernels] else "FALSE"
    environment["FLASH_ATTENTION_FORCE_BUILD"] = "TRUE"  # never fetch a ready-made, unpatched wheel
    environment["FLASH_ATTENTION_SKIP_CUDA_BUILD"] = "FALSE"
    environment["ETAP_CSRC"] = str(csrc)
    if jobs is not None:
        environment["MAX_JOBS"] = str(jobs)
    return environment


_RUNTIME = "include/cuda_runtime_api.h"


def toolkit_setting(environment: Mapping[str, str]) -> dict[str, str]:
    """`CUDA_HOME` for the build, where it is not set and torch would guess wrong.

    torch takes the folder above that of the nvcc on PATH. Where that nvcc is a script or a link elsewhere, the toolkit
    is what nvcc itself names; there, host code would find no CUDA header, after minutes of kernels.
    """
    nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    if environment.get("CUDA_HOME") or environment.get("CUDA_PATH") or not nvcc:
        return {}
    if (Path(nvcc).parents[1] / _RUNTIME).is_file():
        return {}
    command = [nvcc, "--dryrun", "-c", "x.cu"]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(environment), check=False)
    named = re.search(r"^#\$ TOP=(.*)$", run.stderr, re.M)
    if named is None or not (Path(named[1]) / _RUNTIME).is_file():
        return {}
    return {"CUDA_HOME": str(Path(named[1]).resolve())}


def preflight(tree: Path, python: str, csrc: Path, environment: Mapping[str, str]) -> None:
    """Look for what the build needs before starting it.

    Args:
        tree: the source tree.
        python: interpreter to build for.
        csrc: ETAP's device library.
        environment: the build's environment.

    Raises:
        BuildError: CUTLASS, the adapter header or kernels, git, ninja, the CUDA toolkit, or a torch with CUDA is
            missing; lists all that is.
    """
    problems = []
    if not (tree / "csrc/cutlass/include").is_dir():
        problems.append(f"{tree}/csrc/cutlass: empty; in a checkout run git submodule update --init csrc/cutlass")
    if not (csrc / "etap" / "fa3_adapter.h").is_file():
        problems.append(f"csrc={csrc}: no etap/fa3_adapter.h in it")
    if not any(csrc.glob("fa3/*_sm90.cu")):
        problems.append(f"csrc={csrc}: no fa3/*_sm90.cu in it")
    if not shutil.which("git", path=environment.get("PATH")):
        problems.append("git: not on PATH (upstream's setup.py calls it)")
    probe = (
        "import json, shutil, sys\n"
        "out = {}\n"
        "try:\n"
        "    import torch\n"
        "    from torch.utils.cpp_extension import CUDA_HOME, is_ninja_available\n"
        "    out = dict(torch=torch.__version__, cuda=torch.version.cuda, home=CUDA_HOME, ninja=is_ninja_available())\n"
        "    import packaging, setuptools, wheel.bdist_wheel\n"
        "except ImportError as error:\n"
        "    out['missing'] = str(error)\n"
        "print(json.dumps(out))\n"
    )
    run = subprocess.run([python, "-c", probe], capture_output=True, text=True, env=dict(environment), check=False)
    try:
        found = json.loads(run.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise BuildError(f"python={python}: does not run", command=python, tail=run.stderr.splitlines()[-5:]) from None
    if "missing" in found:
        problems.append(f"python={python}: {found['missing']}")
    if "torch" in found and not found["cuda"]:
        problems.append(f"torch {found['torch']}: built without CUDA; a CUDA build is needed")
    if "torch" in found and not found["home"]:
        problems.append("CUDA toolkit: not found; set CUDA_HOME to it")
    if "torch" in found and not found["ninja"]:
        problems.append("ninja: not found; install it")
    if problems:
        raise BuildError("cannot build:\n" + "\n".join(f"  {p}" for p in problems))


def make_farm(tree: Path, farm: Path, products: Path) -> Path:
    """A directory of links to the tree for upstream's build to run in, so that it writes nothing into the tree.

    Upstream's setup.py puts products beside itself, calls `git submodule update`, and reads ``../README.md``, which the
    registry archive does not have; a placeholder stands in for it.

    Args:
        tree: the source tree.
        farm: the directory to create anew.
        products: directory for intermediate files, kept from build to build.

    Returns:
        The directory of setup.py in the farm.
    """
    shutil.rmtree(farm, ignore_errors=True)
    hopper = farm / "hopper"  # a real directory: ".." must lead to the farm
    hopper.mkdir(parents=True)
    products.mkdir(parents=True, exist_ok=True)
    (hopper / "build").symlink_to(products)
    for entry in (tree / "hopper").iterdir():
        if entry.name not in ("build", "dist") and entry.suffix != ".egg-info":  # of the user's own builds
            (hopper / entry.name).symlink_to(entry)
    (farm / "csrc").symlink_to(tree / "csrc")
    if (tree / "README.md").is_file():
        (farm / "README.md").symlink_to(tree / "README.md")
    else:
        (farm / "README.md").write_text("FlashAttention-3, patched with ETAP.\n", encoding="utf-8")
    return hopper


def build(
    release: Release,
    tree: Path,
    *,
    kernels: str = "mla-decode",
    csrc: Path | None = None,
    output: Path | None = None,
    jobs: int | None = None,
    python: str = sys.executable,
    progress: BuildProgress | None = None,
) -> BuildResult:
    """Build a wheel of the patched tree. Build products stay outside the tree and are reused by the next build.

    Args:
        release: a FlashAttention-3 release.
        tree: its patched tree.
        kernels: which kernels to compile, a key of `KERNEL_SETS`.
        csrc: ETAP's device library (default: the project's).
        output: directory for the wheel, the log and intermediate files (default: in the user's cache).
        jobs: compile jobs in parallel.
        python: interpreter to build for; needs a torch with CUDA.
        progress: called with (steps done, steps in all, step).

    Raises:
        BuildError: something needed is missing, or a step failed; the message has the failing command and the log.
        UnknownNameError: there is no such kernel set.
        VerifyError: the tree is not patched.
    """
    if release.upstream != "flash-attention-3":
        raise BuildError(f"upstream={release.upstream}: has no build step; only flash-attention-3 has one")
    series.verify(release, tree)
    csrc = (csrc or locations.csrc_root()).resolve()
    environment = build_environment(kernels, csrc, jobs, os.environ)
    environment |= toolkit_setting(environment)
    preflight(tree, python, csrc, environment)
    output = (output or locations.cache_root() / "build" / f"{release.upstream}-{release.id}-{kernels}").absolute()
    work, dist, log = output / "work", output / "dist", output / "build.log"
    dist.mkdir(parents=True, exist_ok=True)
    hopper = make_farm(tree, output / "src", work)
    command = [python, "setup.py", "bdist_wheel", "--dist-dir", str(dist)]
    known = {wheel: wheel.stat().st_mtime_ns for wheel in dist.glob("*.whl")}
    run_logged(command, cwd=hopper, environment=environment, log=log, progress=progress)
    built = [wheel for wheel in dist.glob("*.whl") if known.get(wheel) != wheel.stat().st_mtime_ns]
    if len(built) != 1:
        raise BuildError(f"{dist}: expected one new wheel, found {len(built)}", command=shlex.join(command), log=log)
    return BuildResult(built[0], log)


_PRODUCT = re.compile(r" -o (\S+)")
_SHOWN_LINES = 25  # of a failing command's output
_NINJA_STEP = re.compile(r"\[(\d+)/(\d+)\] (.*)")


def run_logged(
    command: list[str], *, cwd: Path, environment: Mapping[str, str], log: Path, progress: BuildProgress | None = None
) -> None:
    """Run a build command; every line goes to the log, ninja's step counter to `progress`.

    Raises:
        BuildError: it failed; the message has the command that failed inside it, as ninja reports it, and what that
            printed (without ninja: the end of the log).
    """
    tail: collections.deque[str] = collections.deque(maxlen=_SHOWN_LINES)
    failed: list[str] = []  # ninja's FAILED line, the command, and the beginning of its output
    in_failure = False
    with log.open("w", encoding="utf-8") as sink:
        sink.write(f"$ cd {cwd}\n$ {shlex.join(command)}\n")
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**environment, "PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise BuildError(f"cannot start: {error}", command=shlex.join(command), log=log) from error
        try:
            assert process.stdout is not None
            for line in process.stdout:
                sink.write(line)
                sink.flush()
                line = line.rstrip()
                step = _NINJA_STEP.match(line)
                if step and progress:
                    made = _PRODUCT.search(step[3])
                    progress(int(step[1]), int(step[2]), Path(made[1]).stem if made else step[3][:40])
                if step or line.startswith(("ninja: ", "Traceback ")):
                    in_failure = False
                if line.startswith("FAILED:") and not failed:
                    in_failure = True
                if in_failure and len(failed) < _SHOWN_LINES + 2:
                    failed.append(line)
                tail.append(line)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code != 0:
        raise BuildError(
            f"the build failed with exit status {code}" + (f" ({failed[0]})" if failed else ""),
            command=failed[1] if len(failed) > 1 else shlex.join(command),
            log=log,
            tail=failed[2:] or tail,
        )
