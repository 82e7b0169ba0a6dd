"""`etap model`: the cost model's table, and the roofline it implies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from etap_integration import costmodel
from etap_integration.cli.output import CommandError, JsonOption, MissingError, emit, out, reported, table
from etap_integration.costmodel import Comparison, Gpu, Problem

K = 1024
LENGTHS = (512, K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K)
THIS = "this"


def this_gpu() -> Gpu:
    """The model of the first CUDA device. Raises MissingError where there is none, or none of Hopper's."""
    import torch

    if not torch.cuda.is_available():
        raise MissingError("gpu: 'this' needs a GPU, and torch sees none; name one of " + ", ".join(costmodel.GPUS))
    p = torch.cuda.get_device_properties(0)
    if p.major != 9:
        raise MissingError(f"gpu: {p.name} has compute capability {p.major}.{p.minor}; the model is of Hopper, 9.0")
    clock, memory = getattr(p, "clock_rate", 0) / 1e6, getattr(p, "memory_clock_rate", 0) / 1e6
    return costmodel.gpu_of(p.name, p.multi_processor_count, clock, memory, getattr(p, "memory_bus_width", 0))


def find_gpu(name: str) -> Gpu:
    """A GPU by the name given on the command line. Raises CommandError or MissingError."""
    try:
        return this_gpu() if name == THIS else costmodel.gpu(name)
    except ValueError as error:
        raise CommandError(f"{error}, {THIS}") from None


def show_comparisons(comparisons: list[Comparison]) -> None:
    """Prints one table: a line per problem, times in µs."""
    device = comparisons[0].gpu
    names = list(comparisons[0].estimates)
    header = ["batch", "KV length", "floor", "tensor q-major", "tensor ETAP", *names, "winner", "speed-up"]
    rows = []
    for c in comparisons:
        etap = c.estimates["etap"]
        upstream = next(c.estimates[name] for name in costmodel.UPSTREAMS if name in c.estimates)
        rows.append([
            f"{c.problem.batch}", f"{c.problem.kv_len:,}", f"{etap.hbm_us:.1f}", f"{upstream.tensor_us:.1f}",
            f"{etap.tensor_us:.1f}", *(f"{e.total_us:.1f}" for e in c.estimates.values()), c.winner, f"{c.speedup:.2f}",
        ])  # fmt: skip
    p = comparisons[0].problem
    title = f"{device.name}: predicted µs, {p.heads} heads, {p.q_len} query token(s), {p.kv_dtype}, page {p.page_size}"
    table(title, header, rows)


@reported
def model(
    gpu: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(costmodel.GPUS)}, {THIS} (the device here). Repeatable; default h20, h200."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Requests. Repeatable; default 16.")] = None,
    kv_len: Annotated[list[int] | None, typer.Option(help="Keys of each. Repeatable; default 512 to 64K.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 16,
    q_len: Annotated[int, typer.Option(help="Query tokens of each request.")] = 1,
    page_size: Annotated[int, typer.Option(help="Keys of a page.")] = 64,
    kv_dtype: Annotated[str, typer.Option(help=f"Cache: {', '.join(costmodel.KV_BYTES)}.")] = "bf16",
    plot: Annotated[
        Path | None, typer.Option(help="Draw the roofline into this file (.png, .svg, .pdf); needs matplotlib.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Predicted tensor, memory and call times of query-major and transposed pipelines, and the winner. Needs no GPU.

    Times are what a benchmark with a cold L2 would measure, launch included. "floor" is the time in which the KV bytes
    can be read; "tensor" the time in which the busiest SM's tensor core has work.
    """
    devices = [find_gpu(name) for name in gpu or ("h20", "h200")]
    try:
        problems = [Problem(b, n, heads, q_len, page_size, kv_dtype) for b in batch or (16,) for n in kv_len or LENGTHS]
    except ValueError as error:
        raise CommandError(str(error)) from None
    found = [[costmodel.compare(p, device) for p in problems] for device in devices]

    def show() -> None:
        for comparisons in found:
            show_comparisons(comparisons)
            out.print()

    if plot is not None:
        roofline(problems, devices, plot)
    emit(as_json, [_as_dict(c) for comparisons in found for c in comparisons], show)


def _as_dict(c: Comparison) -> dict[str, Any]:
    return {"gpu": c.gpu.name, "problem": c.problem, "winner": c.winner, "speedup": c.speedup, "estimates": c.estimates}


def pyplot() -> Any:
    """matplotlib's pyplot on a backend that needs no display. Raises MissingError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise MissingError("drawing needs matplotlib: pip install 'etap-integration[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def roofline(problems: list[Problem], devices: list[Gpu], path: Path) -> None:
    """Draws useful TFLOP/s over arithmetic intensity (query rows), one panel a GPU, into `path`.

    Roofs: memory, and what the tensor cores leave of their rate to useful rows in either pipeline. Points: predictions.
    """
    plt = pyplot()
    figure, panels = plt.subplots(1, len(devices), figsize=(6 * len(devices), 4.5), squeeze=False)
    rows = list(range(1, 65))
    flop_per_row = 2 * (costmodel.D_QK + costmodel.D_V)
    for panel, device in zip(panels[0], devices, strict=True):
        rate = device.sms * device.clock_ghz * 1e9 * flop_per_row * costmodel.TILE / 1e12  # per row and tile cycle
        width = costmodel.KV_BYTES[problems[0].kv_dtype] * costmodel.D_QK
        memory = [device.stream_tb_s * r * flop_per_row / width for r in rows]
        panel.plot(rows, memory, "k--", label="memory")
        for label, tile in (
            ("query-major", costmodel.query_major_tile),
            ("transposed", lambda r: costmodel.etap_tile(r, 1)),
        ):
            roof = [rate * r / tile(r).cycles(device.wgmma_cycles) for r in rows]
            panel.plot(rows, roof, label=f"wgmma, {label}")
        for p in problems:
            for name, marker in (("fa3", "s"), ("flashinfer", "^"), ("etap", "o")):
                if name in (estimates := costmodel.compare(p, device).estimates):
                    newest = p is problems[-1]
                    panel.plot(
                        p.rows, estimates[name].tflop_s, marker, color="C3" if name == "etap" else "0.4",
                        alpha=1.0 if newest else 0.35, label=f"{name}, predicted" if newest else None,
                    )  # fmt: skip
        panel.set(xlabel="query rows (tokens × heads)", ylabel="useful TFLOP/s", title=device.name)
        panel.set(xscale="log", yscale="log", xticks=[1, 2, 4, 8, 16, 32, 64])
        panel.set_xticklabels(["1", "2", "4", "8", "16", "32", "64"])
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"plot: {path}: {error}") from None
    finally:
        plt.close(figure)
