"""`etap overview`, the main command: what is built, what the pipelines are worth, and what to expect. Needs no GPU."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from etap_integration import __version__, _library, costmodel, numerics
from etap_integration.cli import checkout, modelling
from etap_integration.cli.output import Exit, JsonOption, MissingError, emit, out, reported, table
from etap_integration.costmodel import GPUS, Problem

ROW_COUNTS = (8, 16, 32, 64)
EXPECTED = (Problem(16, 4096), Problem(16, 16384), Problem(16, 65536))
SAMPLE_KERNEL = "mla_decode_bf16_rows16.cu"


def configurations() -> dict[str, Any]:
    """The kernel's tile configurations, and how a batch is divided; {"reason": ...} without the host module."""
    try:
        host = _library.host_module()
    except RuntimeError as reason:
        return {"reason": str(reason)}
    work = [pieces for pieces in host.cta_work([65536] * 16, None, 16, 16, 132) if pieces]
    tiles = [sum(p[3] - p[2] for p in pieces) for pieces in work]
    return {
        "configurations": [dict(c) for c in host.kernel_configs()],
        "example": {"requests": 16, "kv_len": 65536, "sms": 132, "ctas": len(work), "tiles": [min(tiles), max(tiles)]},
    }


def instruction_counts() -> list[dict[str, Any]]:
    """wgmma of one 64-key tile, and the cycles they take, in both pipelines by number of query rows."""
    counted = []
    for rows in ROW_COUNTS:
        for name, tile in (
            ("query-major", costmodel.query_major_tile(rows)),
            ("transposed", costmodel.etap_tile(rows, 1)),
        ):
            cycles = {key: tile.cycles(GPUS[key].wgmma_cycles) for key in ("h200", "h20")}
            counted.append({"rows": rows, "pipeline": name, "scores": tile.scores, "output": tile.output,
                            "useful": tile.useful, "cycles": cycles})  # fmt: skip
    return counted


def check_patches(offline: bool) -> dict[str, dict[str, Any]]:
    """For every upstream with patches: the state of its pinned tree, fetched where it is not in the cache.

    Each has {"state", "problems"}, or {"not_run": reason}.
    """
    from etap_integration import patching
    from etap_integration.patching import locations

    found: dict[str, dict[str, Any]] = {}
    try:
        names = patching.upstream_names()
    except patching.PatchingError as error:
        return {"patches": {"not_run": str(error)}}
    for name in names:
        release = patching.load_manifest(name).release()
        if not release.patch_names:
            found[name] = {"not_run": "its series is empty"}
            continue
        try:
            if offline and not any((locations.cache_root() / "archives").glob(f"*{release.archive.filename}")):
                found[name] = {"not_run": f"{release.archive.filename} is not in the cache, and --offline was given"}
                continue
            patching.fetch(release)
            report = patching.check(release, patching.locate_tree(release, None))
            found[name] = {"release": release.id, "state": report.state.value, "problems": list(report.problems)}
        except patching.PatchingError as error:
            found[name] = {"not_run": str(error)}
    return found


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def compiled_kernels() -> dict[str, Any]:
    """Registers, spills and wgmma shapes: of the built library, else of one kernel compiled now where nvcc is.

    {"of", "kernels": {mangled name: report}, "shapes": {mangled name: ["64x16x16", ...]} or a reason}, or
    {"not_run": reason}.
    """
    report = _library.ptxas_report()
    if report is not None:
        current = "?"
        with contextlib.suppress(MissingError):
            current = checkout.tool("etap_build").sources_hash()
        stale = current not in ("?", report["build"].get("sources"))
        what = "the built library" + (", from other sources than these" if stale else "")
        return {"of": what, "kernels": report["kernels"], "shapes": _shapes(_library.library_path())}
    try:
        build = checkout.tool("etap_build")
        with _environment(ETAP_COMPILE_ONLY="1"), tempfile.TemporaryDirectory() as folder:
            plan = build.Plan.make()
            source = next(s for s in plan.sources() if s.name == SAMPLE_KERNEL)
            compiled, record = build._compile(plan, source, Path(folder), lambda text: None)
            return {"of": f"csrc/instances/{SAMPLE_KERNEL}, compiled just now", "kernels": record["kernels"],
                    "shapes": _shapes(compiled)}  # fmt: skip
    except (MissingError, RuntimeError, OSError, StopIteration, subprocess.CalledProcessError) as reason:
        return {"not_run": str(reason) or f"no {SAMPLE_KERNEL}"}


def _shapes(binary: Path) -> dict[str, list[str]] | str:
    """M x N x K of the wgmma in each kernel's machine code, or why they could not be read."""
    folders = [str(p) for p in sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("*/bin"))]
    path = os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    if not shutil.which("cuobjdump", path=path) or not shutil.which("nvdisasm", path=path):
        return "not run: no cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)"
    command = [str(shutil.which("cuobjdump", path=path)), "--dump-sass", "-arch", "sm_90a", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    if done.returncode:
        return f"not run: cuobjdump failed: {done.stderr.strip()}"
    sections = re.split(r"^\s*Function : (\S+)$", done.stdout, flags=re.M)[1:]
    found = zip(sections[::2], sections[1::2], strict=True)
    return {name: sorted(set(re.findall(r"\bHGMMA\.(\d+x\d+x\d+)", code))) for name, code in found}


def gather(offline: bool) -> dict[str, Any]:
    """Everything the command reports."""
    info = _library.build_info()
    return {
        "version": __version__,
        "torch": torch.__version__,
        "library": info["library"],
        "work": configurations(),
        "compiled": compiled_kernels(),
        "patches": check_patches(offline),
        "numerics": numerics.survey(),
        "instructions": instruction_counts(),
        "predicted": [costmodel.compare(p, g) for g in GPUS.values() if not g.throttled for p in EXPECTED],
    }


def _show_build(found: dict[str, Any]) -> None:
    library = found["library"]
    out.print(f"etap_integration {found['version']}, torch {found['torch']}", style="bold", markup=False)
    out.print(f"operator library: {'loaded' if library['loaded'] else library['reason']}", markup=False)
    compiled = found["compiled"]
    if "not_run" in compiled:
        out.print(f"compiled kernels: not run: {compiled['not_run']}", markup=False)
    else:
        out.print(f"compiled kernels ({compiled['of']}):", markup=False)
        for mangled, kernel in compiled["kernels"].items():
            spilled = kernel.get("spill_stores", 0) + kernel.get("spill_loads", 0)
            shapes = compiled["shapes"].get(mangled, []) if isinstance(compiled["shapes"], dict) else []
            name = kernel.get("name", mangled)
            line = f"  {kernel.get('registers')} registers at entry, {spilled} B spilled"
            out.print(f"{line}, wgmma {', '.join(shapes) or '?'}: {name}", markup=False)
        if isinstance(compiled["shapes"], str):
            out.print(f"  wgmma shapes {compiled['shapes']}", markup=False)
    work = found["work"]
    if "reason" in work:
        out.print(f"host module: {work['reason']}", markup=False)
    else:
        for c in work["configurations"]:
            s, o = c["wgmma_n"]
            line = f"{c['cache']} cache, up to {c['row_tile']:2} rows, P in {c['p_parts']}: wgmma m64n{s}k16 for S^T, "
            line += f"m64n{o}k16 for O^T, {c['ring_chunks']} ring chunks, {c['smem_bytes']} B of shared memory"
            out.print(line, markup=False)
        e = work["example"]
        out.print(f"16 requests of 64K keys on 132 SMs: {e['ctas']} CTAs of {e['tiles'][0]} to {e['tiles'][1]} tiles")
    for name, patch in found["patches"].items():
        text = f"not run: {patch['not_run']}" if "not_run" in patch else f"{patch['state']}, release {patch['release']}"
        out.print(f"patch check, {name}: {text}", markup=False)
        for problem in patch.get("problems", ()):
            out.print(f"  problem: {problem}", markup=False, style="red")


def _show(found: dict[str, Any]) -> None:
    _show_build(found)
    out.print()
    numerics.show(found["numerics"])
    out.print()
    rows = [
        [f"{c['rows']}", c["pipeline"], "{} × m64n{}k16".format(*c["scores"]), "{} × m64n{}k16".format(*c["output"]),
         f"{c['useful']:.0%}", f"{c['cycles']['h200']:,.0f}", f"{c['cycles']['h20']:,.0f}"]
        for c in found["instructions"]
    ]  # fmt: skip
    header = ["rows", "pipeline", "scores", "output", "useful", "cycles H200", "cycles H20"]
    table("wgmma of one 64-key tile, P in one part; the rest of the work is padding", header, rows, text_columns=2)
    out.print()
    for i in range(0, len(found["predicted"]), len(EXPECTED)):
        modelling.show_comparisons(found["predicted"][i : i + len(EXPECTED)])
        out.print()


@reported
def overview(
    offline: Annotated[bool, typer.Option("--offline", help="Do not fetch the pinned upstreams.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What is built, the patch check, the pipelines' numerics, instruction counts and predicted times. Needs no GPU.

    On a Hopper GPU with the operator library, in a checkout, it goes on to time the operator beside the memory floor
    and the upstream kernels. Exit code 1 where a pinned upstream does not take its patches.
    """
    found = gather(offline)
    emit(as_json, found, lambda: _show(found))
    bad = any(patch.get("problems") for patch in found["patches"].values())
    if _library.on_hopper() and found["library"]["loaded"] and not as_json:
        try:
            folder = checkout.root()
        except MissingError as reason:
            out.print(f"no timing: {reason}", markup=False)
        else:
            command = [sys.executable, "-m", "etap_integration", "bench", "--grid", "bars"]
            bad |= subprocess.run(command, cwd=folder, check=False).returncode != 0
    elif not as_json:
        out.print("no timing: that takes a Hopper GPU and the operator library")
    if bad:
        raise typer.Exit(Exit.NEGATIVE)
