"""What the tests here need, and how the operator's run a problem and judge what comes out."""

from __future__ import annotations

import math
import os

import pytest
import torch
from problems import Built, Problem, build, gpu_p_parts, judge

from etap_integration import mla_decode
from etap_integration._library import on_hopper

_FOUND = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU"
NEEDS_HOPPER = [pytest.mark.gpu, pytest.mark.skipif(not on_hopper(), reason=f"needs a Hopper GPU, found {_FOUND}")]
DRAWN = int(os.environ.get("ETAP_TEST_PROBLEMS", "320"))


def poison_next_lse(built: Built) -> None:
    """Leaves NaN in the memory that the LSE will most likely be given."""
    q = built.args[0]
    poison = torch.full((q.numel() // 512,), math.nan, device=q.device)
    del poison


def run(built: Built, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE; `more` replaces the problem's own options."""
    out = built.new_out()
    poison_next_lse(built)
    result, lse = mla_decode(*built.args, **{**built.options, **more}, out=out, return_lse=True)
    assert result is out
    return out, lse


def check(problem: Problem) -> None:
    """Right, and the same bits twice."""
    built = build(problem, "cuda")
    out, lse = run(built)
    judge(built, out, lse, gpu_p_parts(problem))
    again, lse_again = run(built)
    assert torch.equal(out, again), f"output differs between two calls: {problem}"
    assert torch.equal(lse, lse_again), f"LSE differs between two calls: {problem}"
