"""Shared fixtures. Nothing here needs a GPU or the built libraries."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from etap_integration import _library


@pytest.fixture(scope="session")
def host() -> ModuleType:
    """The pybind11 host module, skipped where it is not built."""
    try:
        return _library.host_module()
    except RuntimeError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def ptxas() -> dict[str, Any]:
    """The ptxas report of the built operator library, skipped where there is none."""
    report = _library.ptxas_report()
    if report is None:
        pytest.skip(f"not run: {_library.LIBRARY_NAME} is not built here (needs nvcc, CUDA torch and CUTLASS)")
    return report
