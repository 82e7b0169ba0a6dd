"""The generated README sections, the plots, and the emulated H20's tables, from rows made up here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from etap_integration.cli.modelling import pyplot
from tools.bench import emulation, readme, records, rivals
from tools.bench.paper import LENGTHS, PAPER
from tools.bench.records import Row

ROW = Row(
    impl="etap", kv_dtype="bf16", batch=16, kv_len=512, heads=16, q_len=1, page_size=64, mode="eager", emulated=None,
    median_us=10.0, p20_us=9.0, p80_us=11.0, rmse=None, run="20260101T000000Z-ab12", gpu="NVIDIA H200", driver="1",
    torch="2", upstream=None, commit="c" * 40, sources="s" * 64, command="python -m tools.bench run",
)  # fmt: skip
TIMES = {"floor": 8.0, "fa3": 20.0, "flashinfer": 16.0, "etap": 10.0}
DOCUMENT = "".join(f"# {n}\n<!-- generated: {n} -->\nold\n<!-- end of {n} -->\n" for n in readme.SECTIONS)


def bars(**changes: Any) -> list[Row]:
    rows = []
    for kv_len in (512, 65536):
        for impl, time in TIMES.items():
            upstream = "pkg==1" if impl in ("fa3", "flashinfer") else None
            rows.append(replace(ROW, impl=impl, kv_len=kv_len, median_us=time, p20_us=time, p80_us=time,
                                upstream=upstream, **changes))  # fmt: skip
    return rows


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path


def test_without_rows_it_says_not_run(results: Path) -> None:
    text = readme.replace_sections(DOCUMENT, "s" * 64)
    assert text.count("not run") == 6 and "old" not in text and "# results" in text
    assert readme.replace_sections(text, "s" * 64) == text


def test_tables_hold_the_rows(results: Path) -> None:
    records.append(results / "bars.jsonl", bars() + bars(batch=1, mode="graph") + bars(page_size=1))
    text = readme.results_section("s" * 64)
    assert "NVIDIA H200, driver 1, torch 2, pkg==1; run `20260101T000000Z-ab12`" in text and "Stale" not in text
    assert "| 65,536 | 8.0 | 20.0 (2.50) | 16.0 (2.00) | 10.0 (1.25) | 1.60 |" in text
    assert "Page size 1" in text and "Batch 1 in a CUDA graph" in text
    assert "geometric mean 1.60 × the better upstream's speed, from 1.60 to 1.60; slower in 0" in text


def test_patched_upstreams_beside_unpatched_ones(results: Path) -> None:
    rows = [replace(r, impl={"etap": "flashinfer-etap"}.get(r.impl, r.impl)) for r in bars() if r.impl != "fa3"]
    records.append(results / "flashinfer-bars.jsonl", rows)
    fa3, flashinfer = readme.patched_section("t" * 64).split("**FlashInfer**")
    assert "not run" in fa3 and "not run" not in flashinfer and "Stale" in flashinfer
    assert "| 65,536 | 8.0 | 16.0 (2.00) | 10.0 (1.25) | 1.60 |" in flashinfer
    assert "geometric mean 1.60" in flashinfer


def test_plots_are_linked_once_they_are_drawn(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "PLOTS", tmp_path / "img")
    records.append(results / "bars.jsonl", bars())
    assert "docs/img" not in readme.results_section(None)
    readme.draw(pyplot(), bars(), readme.PLOTS)
    assert "(docs/img/floor.svg)" in readme.results_section(None)


def test_stale_rows_are_marked_not_hidden(results: Path) -> None:
    records.append(results / "bars.jsonl", bars())
    text = readme.results_section("t" * 64)
    assert text.startswith("**Stale: measured from other kernel sources") and "20.0 (2.50)" in text


def test_only_the_last_run_counts(results: Path) -> None:
    records.append(results / "bars.jsonl", [*bars(run="old"), *bars()])
    assert "`old`" not in readme.results_section(None) and "ab12" in readme.results_section(None)


@pytest.mark.parametrize("change", [("<!-- end of results -->", ""), ("<!-- generated: fp8 -->", "x")])
def test_missing_markers_are_an_error(results: Path, change: tuple[str, str]) -> None:
    with pytest.raises(readme.MarkerError, match="once, in this order"):
        readme.replace_sections(DOCUMENT.replace(*change), None)


def test_plots_are_drawn_and_reproducible(tmp_path: Path) -> None:
    first, second = (readme.draw(pyplot(), bars(), tmp_path / name) for name in "ab")
    assert [path.name for path in first] == ["floor.png", "floor.svg", "speedup.png", "speedup.svg"]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    assert readme.draw(pyplot(), [], tmp_path / "c") == []


def test_the_emulated_h20_stands_beside_the_published_one(results: Path) -> None:
    # 2 * 16 * 65536 * 16 * 1088 FLOP in 2,151 µs are 17.0 TFLOP/s
    rows = [replace(ROW, impl="fa3", emulated="h20", kv_len=65536, median_us=2151.0, p20_us=2151.0, p80_us=2151.0)]
    text = emulation.tables(rows)
    assert "| FlashAttention-3 | emulated | – | – | – | – | – | – | – | 17 |" in text
    assert "An **emulation**, not an H20" in text and "40 cycles" in text and "within 10%" in text
    for batch, published in PAPER.items():
        assert f"useful TFLOP/s, batch {batch}" in text
        for figures in published.values():
            assert f"published, real H20 | {' | '.join(map(str, figures))} |" in text
    assert "not run" in emulation.tables([]) and "not run" not in text
    assert all(len(figures) == len(LENGTHS) for published in PAPER.values() for figures in published.values())


def test_what_the_emulation_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETAP_BENCH_DIR", str(tmp_path))
    assert emulation.missing() == ["libmb.so", "libfi_d.so", "fa3_d.so", "fa3-etap_d.so", "libetap_mla.so"]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libmb.so").touch()
    assert "libmb.so" not in emulation.missing()


@pytest.mark.parametrize("installed", [True, False])
def test_patched_flashinfer_is_measured_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setattr(emulation.importlib.util, "find_spec", lambda name: object() if installed else None)
    wanted = {"floor", "fa3", "flashinfer", "etap", "fa3-etap", *(["flashinfer-etap"] if installed else [])}
    assert set(emulation.implementations()) == wanted <= set(records.IMPLEMENTATIONS)


def test_only_what_is_missing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the build, with the compilers taken out; the throttled headers are real."""
    monkeypatch.setenv("ETAP_BENCH_DIR", str(tmp_path))
    built: list[str] = []
    for kind in ("floor", "flashinfer", "fa3", "fa3_etap"):
        monkeypatch.setattr(rivals.Builder, kind, lambda self, kind=kind: built.append(f"{kind} {self.throttled}"))
    include = tmp_path / "cutlass/cute/arch"
    include.mkdir(parents=True)
    wgmma = '      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "\n      "{%0};\\n"\n'
    (include / "mma_sm90_gmma.hpp").write_text(wgmma)
    (include / "mma_sm90_gmma_ext.hpp").write_text("")

    tool = emulation._etap_build()
    plan = tool.Plan(tool.Nvcc("nvcc", "13.0", ()), tool.Torch(tmp_path, "2.11", "13.0"),
                     tool.Cutlass(tmp_path / "cutlass", "9.9.9"))  # fmt: skip
    plans = []
    monkeypatch.setattr(tool.Plan, "make", classmethod(lambda cls, root=None: plan))
    monkeypatch.setattr(tool, "build_library", lambda output, plan, say: plans.append((output, plan)))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/fa3_d.so").touch()
    emulation.build(log=lambda text: None)
    assert built == ["floor False", "flashinfer True", "fa3_etap True"]
    ((output, used),) = plans
    assert output == emulation.etap_library().parent
    header = used.cutlass.path / "cute/arch/mma_sm90_gmma.hpp"
    assert header.is_relative_to(tmp_path / "throttled") and header.read_text() == wgmma * 2  # N = 16: twice
