"""Recorded rows: schema, appending, the hash of the sources, staleness."""

import hashlib
import json
import multiprocessing
import re
from dataclasses import asdict, replace

import pytest

from tools.bench import records
from tools.bench.records import RecordError, Row

ROW = Row(
    impl="etap", kv_dtype="bf16", batch=16, kv_len=4096, heads=16, q_len=1, page_size=64, mode="eager", emulated=None,
    median_us=33.5, p20_us=33.0, p80_us=34.25, rmse=1.3e-4, run="20260101T000000Z-00ff", gpu="NVIDIA H200",
    driver="580.1", torch="2.11.0", upstream=None, commit="0" * 40, sources="a" * 64,
    command="python -m tools.bench run",
)  # fmt: skip

REQUIRED = [
    "impl", "kv_dtype", "batch", "kv_len", "heads", "q_len", "page_size", "mode", "emulated", "median_us", "p20_us",
    "p80_us", "rmse", "run", "gpu", "driver", "torch", "upstream", "commit", "sources", "command",
]  # fmt: skip


def test_a_row_survives_its_line():
    line = ROW.to_json()
    assert "\n" not in line
    assert Row.from_json(line) == ROW
    assert set(REQUIRED) <= set(json.loads(line))


def test_fields_beyond_the_required_ones_have_defaults():
    values = {name: value for name, value in asdict(ROW).items() if name in REQUIRED}
    assert Row.from_json(json.dumps(values)) == ROW


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(name):
    values = asdict(ROW)
    del values[name]
    with pytest.raises(RecordError, match=name):
        Row.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("impl", "flash"),
        ("kv_dtype", "int8"),
        ("mode", "lazy"),
        ("emulated", "h100"),
        ("batch", "16"),
        ("batch", True),
        ("kv_len", 1.5),
        ("median_us", None),
        ("median_us", 40.0),
        ("p20_us", 0),
        ("rmse", "small"),
        ("run", None),
        ("gpu", 1),
    ],
)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(RecordError, match="times" if name in ("median_us", "p20_us") and value is not None else name):
        Row.from_json(json.dumps({**asdict(ROW), name: value}))


@pytest.mark.parametrize(("line", "message"), [("{", "not JSON"), ("[]", "object"), ('{"speed": 1}', "speed")])
def test_a_line_that_is_no_row_is_refused(line, message):
    with pytest.raises(RecordError, match=message):
        Row.from_json(line)


def test_appending_keeps_what_is_there(tmp_path):
    path = tmp_path / "results" / "bars.jsonl"
    records.append(path, [ROW])
    records.append(path, [replace(ROW, impl="fa3", upstream="x==1"), replace(ROW, impl="floor")])
    assert [row.impl for row in records.read(path)] == ["etap", "fa3", "floor"]
    assert [p.name for p in path.parent.iterdir()] == ["bars.jsonl"]


def test_a_cut_last_line_stays_a_line_of_its_own(tmp_path):
    path = tmp_path / "bars.jsonl"
    path.write_text(ROW.to_json())
    records.append(path, [ROW])
    assert len(records.read(path)) == 2


def test_a_failed_append_changes_nothing(tmp_path):
    path = tmp_path / "bars.jsonl"
    records.append(path, [ROW])
    before = path.read_bytes()

    def rows():
        yield ROW
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.append(path, rows())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["bars.jsonl"]


def _append_some(path, impl):
    for _ in range(10):
        records.append(path, [replace(ROW, impl=impl)])


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / "bars.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_some, args=(path, impl)) for impl in ("floor", "fa3", "etap")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    impls = [row.impl for row in records.read(path)]
    assert sorted(impls) == ["etap"] * 10 + ["fa3"] * 10 + ["floor"] * 10


def test_reading_names_file_and_line(tmp_path):
    path = tmp_path / "bars.jsonl"
    path.write_text(ROW.to_json() + "\n\n{}\n")
    with pytest.raises(RecordError, match=r"bars\.jsonl:3"):
        records.read(path)


def test_no_commit_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.head_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.head_commit(tmp_path) is None


def test_rows_of_other_sources_are_stale():
    other = replace(ROW, sources="b" * 64)
    assert records.stale([ROW, other], ROW.sources) == [other]


def test_run_ids_differ_and_carry_their_label():
    ids = {records.new_run_id() for _ in range(50)}
    assert len(ids) > 1
    assert records.new_run_id("deep-ring").endswith("-deep-ring")


def test_the_recorded_command_holds_no_absolute_path():
    arguments = ["run", "--rivals", "/some/where/rivals", "--library=a=/x/lib.so", "--library", "b=c/lib.so"]
    expected = "python -m tools.bench run --rivals rivals --library=a=lib.so --library b=c/lib.so"
    assert records.portable_command(arguments) == expected


def test_recorded_results_are_valid():
    """Every row parses, and the rows of one run share what is the same for a whole run."""
    for path in sorted(records.RESULTS.glob("*.jsonl")):
        shared = {}
        for row in records.read(path):
            stamp = (row.gpu, row.driver, row.torch, row.commit, row.sources, row.command, row.label)
            assert shared.setdefault(row.run, stamp) == stamp, f"{path.name}: run {row.run}"
            assert not re.search(r"(^|[\s=])/", row.command), f"{path.name}: absolute path in {row.command}"


def test_a_library_of_other_sources_is_refused(tmp_path):
    library = tmp_path / "libetap_mla.so"
    library.write_bytes(b"library")
    records.check_library(library, "a" * 64)  # no report: nothing to compare with
    build = {"sources": "b" * 64, "library": hashlib.sha256(b"library").hexdigest()}
    (tmp_path / "ptxas.json").write_text(json.dumps({"build": build}))
    records.check_library(library, "b" * 64)
    with pytest.raises(ValueError, match=r"bbbbbbbbbbbb.*aaaaaaaaaaaa"):
        records.check_library(library, "a" * 64)
    library.write_bytes(b"another")
    with pytest.raises(ValueError, match="not that library's"):
        records.check_library(library, "b" * 64)
