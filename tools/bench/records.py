"""Recorded measurements: one JSON object a line, one line per implementation and cell.

A row carries what is needed to judge whether it still stands: the run it belongs to (only rows of one run are
compared with each other) and a hash of the kernel sources it was measured from. A row whose hash differs from the
tree's is stale.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path, PurePath
from typing import Any, get_args, get_origin, get_type_hints

from tools.etap_build import sources_hash as sources_hash

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

RESULTS = Path(__file__).resolve().parent / "results"
"""Where the recorded rows lie."""

IMPLEMENTATIONS = ("floor", "fa3", "flashinfer", "etap", "fa3-etap", "flashinfer-etap")


class RecordError(ValueError):
    """A line that is no row."""


@dataclass(frozen=True)
class Row:
    """One measurement. Times are in microseconds; errors are absolute, against fp64, null where not computed.

    Attributes:
        impl: implementation, one of `IMPLEMENTATIONS`.
        kv_dtype, batch, kv_len, heads, q_len, page_size, shortest: the problem, see `tools.bench.problem.Problem`.
        mode: `eager`, `graph` or `warm-graph`, see `tools.bench.grid.Cell`.
        emulated: null, or `h20` for throttled builds on 78 SMs.
        median_us, p20_us, p80_us: quantiles of the samples.
        rmse, max_error: root mean square and largest error of the output.
        lse_rmse, lse_max_error: the same of the LSE.
        run: id of the process that measured.
        gpu, driver, torch: the machine and its software.
        upstream: package and version of an upstream kernel, null for our own.
        commit: commit of the repository, null where unknown.
        sources: hash of the kernel sources, see `sources_hash`.
        command: what was run.
        label: name of a kernel variant under test, null for the repository's kernel.
    """

    impl: str
    kv_dtype: str
    batch: int
    kv_len: int
    heads: int
    q_len: int
    page_size: int
    mode: str
    emulated: str | None
    median_us: float
    p20_us: float
    p80_us: float
    rmse: float | None
    run: str
    gpu: str
    driver: str
    torch: str
    upstream: str | None
    commit: str | None
    sources: str
    command: str
    max_error: float | None = None
    lse_rmse: float | None = None
    lse_max_error: float | None = None
    label: str | None = None
    shortest: int = 0

    def __post_init__(self) -> None:
        for name, kinds in _field_types().items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise RecordError(f"{name} is {value!r}, expected {' or '.join(kind.__name__ for kind in kinds)}")
        for name, known in (
            ("impl", IMPLEMENTATIONS),
            ("kv_dtype", ("bf16", "fp16", "e4m3", "fp8_ds_mla")),
            ("mode", ("eager", "graph", "warm-graph")),
            ("emulated", (None, "h20")),
        ):
            if getattr(self, name) not in known:
                raise RecordError(f"{name} is {getattr(self, name)!r}, expected one of {known}")
        if not 0 < self.p20_us <= self.median_us <= self.p80_us:
            raise RecordError(f"times out of order: p20 {self.p20_us}, median {self.median_us}, p80 {self.p80_us}")

    @property
    def cell(self) -> tuple[Any, ...]:
        """What two rows must share to be compared: everything of the problem, the mode and the emulation."""
        return (
            self.emulated or "", self.kv_dtype, self.mode, self.page_size, self.batch, self.heads, self.q_len,
            self.kv_len, self.shortest,
        )  # fmt: skip

    def to_json(self) -> str:
        """The row as one line, without its newline."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Parses one line; raises RecordError where it is no valid row."""
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecordError(f"not JSON: {error}") from error
        if not isinstance(values, dict):
            raise RecordError(f"expected an object, got {type(values).__name__}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise RecordError(f"unknown fields: {', '.join(unknown)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise RecordError(str(error)) from error


def _field_types() -> dict[str, tuple[type, ...]]:
    """The types that each field of a row may have; an int may stand for a float."""
    if not _FIELD_TYPES:
        for name, hint in get_type_hints(Row).items():
            kinds = get_args(hint) if get_origin(hint) is not None or get_args(hint) else (hint,)
            _FIELD_TYPES[name] = tuple(kinds) + ((int,) if float in kinds else ())
    return _FIELD_TYPES


_FIELD_TYPES: dict[str, tuple[type, ...]] = {}


def read(path: Path) -> list[Row]:
    """All rows of one file; raises RecordError naming file and line where one is invalid."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            try:
                rows.append(Row.from_json(line))
            except RecordError as error:
                raise RecordError(f"{path.name}:{number}: {error}") from error
    return rows


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a file, all or none of them: the file is replaced by a longer copy, under a lock."""
    added = "".join(row.to_json() + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        present = path.read_text() if path.exists() else ""
        if present and not present.endswith("\n"):
            present += "\n"
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(present + added)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    finally:
        os.close(folder)


def head_commit(root: Path = ROOT) -> str | None:
    """The commit checked out, None where there is none or git is not at hand."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def check_library(library: Path, sources: str) -> None:
    """Raises ValueError where the build report beside our library says that other kernel sources went into it.

    Args:
        library: the operator library; its report is `ptxas.json` in the same folder, and may be missing.
        sources: hash of the kernel sources that rows are to be recorded under, see `sources_hash`.
    """
    report = library.with_name("ptxas.json")
    if not report.is_file():
        return
    build = json.loads(report.read_text())["build"]
    if hashlib.sha256(library.read_bytes()).hexdigest() != build.get("library"):
        raise ValueError(f"{report.name} beside {library.name} is not that library's: build again")
    if build["sources"] != sources:
        raise ValueError(
            f"{library.name} was built from sources {build['sources'][:12]}, rows would name {sources[:12]}: rebuild"
        )


def stale(rows: Iterable[Row], sources: str) -> list[Row]:
    """The rows that were measured from other kernel sources than those with the hash `sources`."""
    return [row for row in rows if row.sources != sources]


def new_run_id(label: str | None = None) -> str:
    """An id for this process: UTC time, four random hex digits, and the label of a variant if there is one."""
    stamp = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    return f"{stamp}-{label}" if label else stamp


def portable_command(arguments: Sequence[str]) -> str:
    """The command line to record: absolute paths are cut to their last part, since they mean nothing elsewhere."""

    def portable(argument: str) -> str:
        head, equals, tail = argument.rpartition("=")
        return head + equals + (PurePath(tail).name if tail.startswith("/") else tail)

    return shlex.join(["python", "-m", "tools.bench", *map(portable, arguments)])


@dataclass(frozen=True)
class Stamp:
    """The fields that all rows of one run share."""

    run: str
    gpu: str
    driver: str
    torch: str
    commit: str | None
    sources: str
    command: str
    label: str | None = None


def driver_version() -> str:
    """The NVIDIA driver's version, `unknown` where `nvidia-smi` does not say."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    return lines[0] if lines else "unknown"
