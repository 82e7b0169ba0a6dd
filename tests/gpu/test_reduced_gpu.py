"""The reduced set, which `python -m tools.sanitize` runs under compute-sanitizer."""

from __future__ import annotations

import pytest
from operator_run import NEEDS_HOPPER, check
from problems import Problem, reduced

pytestmark = NEEDS_HOPPER
PROBLEMS = reduced()


@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
def test_reduced(problem: Problem) -> None:
    check(problem)
