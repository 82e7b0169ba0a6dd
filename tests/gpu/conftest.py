"""What holds for every test on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from etap_integration import _library


@pytest.fixture(autouse=True, scope="session")
def library() -> None:
    """A GPU runner without the library fails, and does not skip."""
    reason = _library.load()
    assert reason is None, reason


@pytest.fixture(autouse=True, scope="session")
def full_precision_references() -> Iterator[None]:
    """No TF32 in the references."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
