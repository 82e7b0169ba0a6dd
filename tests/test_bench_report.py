"""Reports made from rows."""

from dataclasses import replace

import pytest

from tools.bench import report
from tools.bench.records import Row

SOURCES = "a" * 64
ROW = Row(
    impl="etap", kv_dtype="bf16", batch=16, kv_len=65536, heads=16, q_len=1, page_size=64, mode="eager", emulated=None,
    median_us=280.0, p20_us=280.0, p80_us=280.0, rmse=None, run="run-1", gpu="NVIDIA H200", driver="580.1",
    torch="2.11.0", upstream=None, commit="c" * 40, sources=SOURCES, command="python -m tools.bench run",
)  # fmt: skip


def _rows(times_us, **fields):
    """One row for each implementation of a cell, all samples equal."""
    upstream = {"fa3": "xformers==1", "flashinfer": "flashinfer-python==2"}
    return [
        replace(ROW, impl=impl, median_us=us, p20_us=us, p80_us=us, upstream=upstream.get(impl), **fields)
        for impl, us in times_us.items()
    ]


FAST = _rows({"floor": 270.0, "fa3": 300.0, "flashinfer": 297.0, "etap": 283.5})
SLOW = _rows({"floor": 8.0, "fa3": 20.0, "flashinfer": 19.0, "etap": 20.0}, kv_len=512)
WIDE = _rows({"floor": 8.0, "fa3": 20.0, "flashinfer": 30.0, "etap": 40.0}, kv_len=512, heads=32, q_len=2)


def test_times_multiples_and_speedups():
    text = report.run_section("bars", FAST + SLOW, SOURCES)
    assert (
        "| batch | heads | q_len | KV length | floor | fa3 (× floor) | flashinfer (× floor) | etap (× floor) |" in text
    )
    assert "| 16 | 16 | 1 | 65,536 | 270.0 | 300.0 (1.11) | 297.0 (1.10) | 283.5 (1.05) | 1.05 |" in text
    assert "| 16 | 16 | 1 | 512 | 8.0 | 20.0 (2.50) | 19.0 (2.38) | 20.0 (2.50) | 0.95 |" in text
    assert text.index("| 512 |") < text.index("| 65,536 |")
    assert "fa3 from xformers==1; flashinfer from flashinfer-python==2" in text
    assert "python -m tools.bench run" in text


def test_geometric_mean():
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    text = report.run_section("bars", FAST + SLOW, SOURCES)
    expected = (297.0 / 283.5 * 19.0 / 20.0) ** 0.5
    assert f"Geometric mean over 2 cells: {expected:.2f}×" in text


def test_slower_cells_are_listed_with_their_reason():
    cells = report.cells_of(FAST + SLOW + WIDE)
    slower = report.slower_cells(cells, "etap")
    assert [(cell.any.kv_len, cell.any.heads) for cell in slower] == [(512, 16), (512, 32)]
    reasons = [
        report.Reason("another length", kv_len=(513, 1024)),
        report.Reason("tensor-bound", query_rows=(33, 64)),
        report.Reason("too late", query_rows=(33, 64), batch=(1, 128)),
    ]
    text = report.run_section("bars", FAST + SLOW + WIDE, SOURCES, reasons)
    assert "Slower cells: 2, of which 1 with at most 32 query rows." in text
    assert f"- {slower[0]}: 0.95×; no reason given" in text
    assert f"- {slower[1]}: 0.50×; tensor-bound" in text
    assert "Slower cells: none." in report.run_section("bars", FAST, SOURCES)


def test_a_tie_counts_as_slower():
    assert report.slower_cells(report.cells_of(_rows({"fa3": 20.0, "etap": 20.0})), "etap")


def test_targets():
    text = report.run_section("bars", FAST + SLOW, SOURCES)
    lines = [line for line in text.splitlines() if "| × floor |" in line]
    assert len(lines) == 2
    assert lines[0].endswith("| 1.05 | 1.06 | 1.04 | holds |")
    assert lines[1].endswith("| 2.50 | 2 | 1.4 | **missed** |")


def test_targets_on_emulated_hardware_use_emulated_rows_only():
    rows = _rows({"floor": 290.0, "fa3": 2150.0, "flashinfer": 2100.0, "etap": 330.0}, emulated="h20")
    text = report.run_section("h20", rows, SOURCES)
    assert "emulated H20" in text
    assert "| × as fast as fa3 | 6.52 | 6 | 6.5 | goal |" in text
    assert "| × as fast as flashinfer | 6.36 | 5.8 | 6.3 | goal |" in text
    assert "1.06" not in text


def test_stale_runs_are_marked():
    assert "STALE" not in report.run_section("bars", FAST, SOURCES)
    assert "STALE" in report.run_section("bars", FAST, "b" * 64)
    assert "STALE" not in report.run_section("bars", FAST, None)


def test_errors_are_compared_with_fa3():
    good = {"rmse": 1e-4, "max_error": 1e-3, "lse_rmse": 1e-6, "lse_max_error": 1e-5}
    bad = {**good, "max_error": 2e-3, "lse_rmse": 2e-6}
    fa3, etap = _rows({"fa3": 20.0, "etap": 10.0})
    text = report.run_section("bars", [replace(fa3, **good), replace(etap, **good)], SOURCES)
    assert "exceeds fa3's: none." in text
    assert "1.00e-04 / 1.00e-03 / 1.00e-06 / 1.00e-05" in text
    text = report.run_section("bars", [replace(fa3, **good), replace(etap, **bad)], SOURCES)
    assert "exceeds fa3's: 1." in text
    assert text.rstrip().endswith("eager: max, LSE RMSE")
    assert "Errors" not in report.run_section("bars", FAST, SOURCES)


def test_implementations_may_be_missing():
    text = report.run_section("bars", _rows({"etap": 10.0}), SOURCES)
    assert "| 16 | 16 | 1 | 65,536 | – | 10.0 | – |" in text
    text = report.run_section("bars", _rows({"floor": 5.0, "fa3": 10.0}), SOURCES)
    assert "| 16 | 16 | 1 | 65,536 | 5.0 | 10.0 (2.00) |" in text
    assert "Geometric mean" not in text


def test_patched_upstream_has_columns_of_its_own():
    text = report.run_section("patched", _rows({"fa3": 30.0, "etap": 15.0, "fa3-etap": 20.0}), SOURCES)
    assert "etap (× floor) | speed-up | fa3-etap (× floor) | speed-up |" in text
    assert "| 30.0 | 15.0 | 2.00 | 20.0 | 1.50 |" in text


def test_only_rows_of_one_run_are_compared():
    later = [replace(row, run="run-2") for row in SLOW]
    assert report.latest_run(FAST + later) == later
    assert report.latest_run([]) == []
    with pytest.raises(ValueError, match="one run"):
        report.run_section("bars", FAST + later, SOURCES)


def test_of_repeated_rows_the_last_counts():
    again = _rows({"etap": 270.0})
    (cell,) = report.cells_of(FAST + again)
    assert cell.median_us["etap"] == 270.0
