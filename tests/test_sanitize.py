"""The reduced set, and the command that runs it under compute-sanitizer, for which a script stands in here."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from problems import Problem, default_p_parts, reduced
from typer.testing import CliRunner

from etap_integration.cli.output import Exit
from tools import sanitize


def kernel_of(problem: Problem, configs: list[dict[str, Any]]) -> tuple:
    """(query dtype, cache, row tile, parts of P) of the kernel that runs a problem (csrc/etap/launch.h)."""
    cache = "16-bit"
    if problem.rope16:
        cache = "e4m3 groups, 16-bit rope"
    elif problem.groups is not None:
        cache = "e4m3 groups"
    elif problem.e4m3:
        cache = "e4m3"
    tiles = [c["row_tile"] for c in configs if c["cache"] == cache]
    row_tile = min((t for t in tiles if problem.rows <= t), default=max(tiles))
    return problem.dtype, cache, row_tile, default_p_parts(problem)


def test_the_reduced_set_has_every_kernel_with_tma_and_with_gathers(host: ModuleType) -> None:
    configs = host.kernel_configs()
    kernels = {
        (dtype, c["cache"], c["row_tile"], c["p_parts"]) for c in configs for dtype in (torch.bfloat16, torch.float16)
    }
    assert len(kernels) == 44
    for page_size in (64, 1):
        assert {kernel_of(p, configs) for p in reduced() if p.page_size == page_size} == kernels


@pytest.mark.parametrize("failing", [None, "memcheck", "racecheck"])
def test_the_command_runs_both_and_fails_where_one_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str | None
) -> None:
    log = tmp_path / "log"
    script = tmp_path / "compute-sanitizer"
    script.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {log}\n[ "$2" != "{failing}" ]\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sanitize, "on_hopper", lambda: True)
    result = CliRunner().invoke(sanitize.app, ["-k", "7"])
    assert (result.exit_code, result.output.count("failed")) == ((1, 1) if failing else (0, 0))
    runs = log.read_text().splitlines()
    assert [run.split()[:3] for run in runs] == [["1", "--tool", "memcheck"], ["1", "--tool", "racecheck"]]
    assert all("--error-exitcode 1" in run and run.endswith("tests/gpu/test_reduced_gpu.py -k 7") for run in runs)


def test_without_compute_sanitizer_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(sanitize, "find_spec", lambda name: None)
    result = CliRunner().invoke(sanitize.app, [])
    assert result.exit_code == Exit.MISSING and "pip install nvidia-cuda-sanitizer-api" in result.output


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests would be skipped, which is no success."""
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: Path("compute-sanitizer"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(sanitize.app, [])
    assert result.exit_code == Exit.MISSING and "needs a Hopper GPU" in result.output


def test_a_check_that_does_not_exist_is_refused() -> None:
    result = CliRunner().invoke(sanitize.app, ["synccheck"])
    assert result.exit_code == 2 and "there are memcheck, racecheck" in result.output
