"""Traces of a launch: made-up entries, the header's events, and what compiles."""

import re
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from tools import etap_build
from tools.bench import __main__ as cli
from tools.bench import trace
from tools.bench.problem import Problem

HEADER = etap_build.ROOT / "csrc/etap/trace.cuh"


def entries(*ctas):
    """Of CTAs that start at so many ns, with events at so many cycles after it, at 2 cycles a ns."""
    missing = [(0, 0)] * len(trace.EVENTS)
    made = [
        [(0, 0) if c is None else (5000 + start + c // 2, 10**6 * n + 7 + c) for c in cycles]
        for n, (start, cycles) in enumerate(ctas)
    ]
    return made + [missing] * (trace.MAX_CTAS - len(made))


def test_events_are_the_headers():
    body = re.search(r"enum Event \{(.*?)\};", HEADER.read_text(), re.S).group(1)
    names = re.findall(r"^\s*k(\w+)", body, re.M)
    spelt = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name in names]
    assert spelt == [*trace.EVENTS, "events"]
    config = (etap_build.ROOT / "csrc/etap/config.h").read_text()
    assert f"constexpr int kMaxCtas = {trace.MAX_CTAS};" in config


def test_summary_of_made_up_launches():
    full = [0, 2000, 3000, 4000, 5000, 6000, 7000, 8000, 9000]
    late = [0, 2000, 3000, 4000, 5000, 6000, 7000, None, 9200]  # nothing to merge
    lines = {line.event: line for line in trace.summary([entries((0, full), (400, late))] * 3)}
    assert list(lines) == list(trace.EVENTS)
    assert lines["started"] == trace.Line("started", 2, 0.0, 0.2, 0.4, 0.0)
    assert lines["planned"].first == pytest.approx(1.0) and lines["planned"].last == pytest.approx(1.4)
    assert lines["stats there"].ctas == 1 and lines["stats there"].step == pytest.approx(0.5)
    assert lines["ended"].last == pytest.approx(5.0) and lines["ended"].step == pytest.approx((0.5 + 1.1) / 2)
    assert len(trace.table(list(lines.values())).splitlines()) == 1 + len(trace.EVENTS)


def test_a_coarse_global_timer_costs_the_start_alone():
    ctas = entries((0, [0, 2000, None, None, None, None, None, None, 20_000]))
    coarse = [[(0, 0) if e == (0, 0) else (e[0] // 1000 * 1000, e[1]) for e in cta] for cta in ctas]
    assert trace.times_us(coarse)[0][1] == pytest.approx(1.0)


def test_no_trace_is_an_error():
    with pytest.raises(ValueError, match="no CTA left a trace"):
        trace.summary([entries()])


@pytest.mark.parametrize(
    "problem, name",
    [
        (Problem(1, 64), "bf16_16"),
        (Problem(1, 64, heads=8, kv_dtype="fp16"), "fp16_8"),
        (Problem(1, 64, heads=128), "bf16_64"),
        (Problem(1, 64, heads=64, kv_dtype="e4m3"), "bf16_e4m3_32"),
        (Problem(1, 64, heads=8, kv_dtype="fp8_ds_mla"), "bf16_e4m3_groups_rope16_16"),
    ],
)
def test_symbol_is_the_kernels(problem, name):
    assert trace.symbol(problem) == f"etap_trace_{name}"


def test_a_library_without_traces_is_refused(tmp_path):
    library = shutil.copy(next(etap_build.ROOT.glob("etap_integration/_C/_host*.so")), tmp_path / "x.so")
    with pytest.raises(ValueError, match="ETAP_NVCC_FLAGS=-DETAP_TRACE"):
        trace.measure(library, None, type("Inputs", (), {"problem": Problem(1, 64)}))


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("checks what happens without a GPU")
    done = CliRunner().invoke(cli.app, ["trace", "--library", str(tmp_path)], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2 and "Hopper GPU" in done.stderr


def test_kernels_with_traces_compile(tmp_path):
    try:
        nvcc, cutlass = etap_build.Nvcc.find(), etap_build.Cutlass.find()
    except etap_build.Unbuildable as reason:
        pytest.skip(f"not run: {reason}")
    csrc = etap_build.ROOT / "csrc"
    command = [
        nvcc.path,
        *etap_build.NVCC_FLAGS,
        *etap_build.ARCH_FLAGS,
        "-DETAP_TRACE",
        f"-I{csrc}",
        f"-I{cutlass.path}",
    ]
    command += ["-c", str(csrc / "instances/mla_decode_bf16_rows16.cu"), "-o", str(tmp_path / "x.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"etap_trace_bf16_16\0" in (tmp_path / "x.o").read_bytes()
