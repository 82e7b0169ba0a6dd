"""Building the rivals, as far as no compiler is needed."""

import hashlib
import tarfile
import zipfile

import pytest

from tools.bench import rivals

SOURCE = """
    asm volatile(
    "{\\n"
      "setp.ne.b32 p, %6, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n@Nk16.f32.bf16.bf16 "
      "{%0,  %1,  %2,  %3},"
      " p,   %7,  %8,  %9,  %10;\\n"
    "}\\n"
      : "+r"(d0)
"""


@pytest.mark.parametrize(("n", "times"), [(8, 1), (16, 2), (24, 3), (32, 3), (64, 4), (256, 4)])
def test_throttling_repeats_the_instruction_alone(n, times):
    source = SOURCE.replace("@N", str(n))
    text, count = rivals.throttle_source(source)
    assert count == 1
    assert text.count("wgmma.mma_async") == text.count("%10;") == times
    assert text.count("setp.ne") == text.count('"}\\n"') == 1
    lines = source.splitlines(keepends=True)
    assert text == "".join(lines[:4] + lines[4:7] * times + lines[7:])


def test_throttling_leaves_other_instructions_alone():
    text = SOURCE.replace("@N", "64")
    for other in (text.replace("k16.", "k32."), text.replace("mma_async.sync", "mma_async.sp.sync")):
        assert rivals.throttle_source(other) == (other, 0)


def test_an_instruction_without_end_is_an_error():
    with pytest.raises(ValueError, match="no end"):
        rivals.throttle_source(SOURCE.replace("@N", "64").split("%10")[0])


def test_throttled_headers_are_a_copy(tmp_path):
    arch = tmp_path / "include/cute/arch"
    arch.mkdir(parents=True)
    (arch / "mma_sm90_gmma.hpp").write_text(SOURCE.replace("@N", "64"))
    (arch / "copy.hpp").write_text("untouched")
    assert rivals.throttle_cutlass(tmp_path / "include", tmp_path / "out") == 1
    assert (tmp_path / "out/cute/arch/copy.hpp").read_text() == "untouched"
    assert (tmp_path / "out/cute/arch/mma_sm90_gmma.hpp").read_text().count("wgmma.mma_async") == 4
    assert (arch / "mma_sm90_gmma.hpp").read_text().count("wgmma.mma_async") == 1
    (arch / "mma_sm90_gmma.hpp").write_text("nothing")
    with pytest.raises(RuntimeError, match="no wgmma"):
        rivals.throttle_cutlass(tmp_path / "include", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_library_names():
    kinds = ("floor", "fa3", "flashinfer", "flashinfer-e4m3")
    assert [rivals.library_name(kind) for kind in kinds] == ["libmb.so", "fa3.so", "libfi.so", "libfi8.so"]
    throttled = [rivals.library_name(kind, "h20") for kind in kinds]
    assert throttled == ["libmb.so", "fa3_d.so", "libfi_d.so", "libfi8_d.so"]


def test_the_folder_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("ETAP_BENCH_DIR", str(tmp_path))
    assert rivals.bench_dir() == tmp_path
    assert rivals.library_dir() == tmp_path / "lib"


def _wheel(folder, name="pkg-1-py3-none-any.whl"):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("pkg/data/a.h", "a")
        wheel.writestr("pkg/other.py", "b")
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_a_download_with_the_right_hash_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("ETAP_BENCH_DIR", str(tmp_path))
    monkeypatch.setattr(rivals, "_run", lambda *a, **k: pytest.fail("nothing needs to be downloaded"))
    sha256 = _wheel(tmp_path / "downloads")
    folder = rivals.fetch(rivals.Archive("pkg==1", sha256, "pkg", ("pkg/data/",)))
    assert folder == tmp_path / "src/pkg"
    assert [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()] == ["pkg/data/a.h"]


def test_a_download_is_pinned_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("ETAP_BENCH_DIR", str(tmp_path))
    _wheel(tmp_path / "downloads")  # its hash is not the pinned one
    commands = []

    def pip(command, **options):
        commands.append(command)
        target = command[command.index("-d") + 1]
        assert "pkg==1 --hash=sha256:0000" in (tmp_path / "downloads").joinpath(target, "requirements.txt").read_text()
        with tarfile.open(f"{target}/pkg-1.tar.gz", "w:gz"):
            pass

    monkeypatch.setattr(rivals, "_run", pip)
    path = rivals.download(rivals.Archive("pkg==1", "0000", "pkg"), tmp_path / "downloads")
    assert path == tmp_path / "downloads/pkg-1.tar.gz"
    assert "--require-hashes" in commands[0]
    assert sorted(p.name for p in (tmp_path / "downloads").iterdir()) == ["pkg-1-py3-none-any.whl", "pkg-1.tar.gz"]


def test_a_failed_compilation_leaves_nothing(tmp_path):
    log = []
    builder = rivals.Builder(log=log.append)
    with pytest.raises(RuntimeError, match="status 3"):
        builder._produce(tmp_path / "lib.so", ["bash", "-c", "touch $2; exit 3", "bash"])
    assert list(tmp_path.iterdir()) == []
    builder._produce(tmp_path / "lib.so", ["bash", "-c", "echo built > $2", "bash"])
    assert [p.name for p in tmp_path.iterdir()] == ["lib.so"]
    assert log == ["building lib.so"] * 2


def test_objects_are_compiled_once_for_each_command(tmp_path, monkeypatch):
    monkeypatch.setenv("ETAP_BENCH_DIR", str(tmp_path))
    source = tmp_path / "a.cu"
    source.write_text("x")
    log = []
    builder = rivals.Builder(log=log.append)
    compiler = ["bash", "-c", "echo > ${@: -1}", "bash"]
    first = builder._object(source, compiler)
    assert builder._object(source, compiler) == first
    assert len(log) == 1
    other = builder._object(source, [*compiler, "-O3"])
    source.write_text("y")
    changed = builder._object(source, compiler)
    assert len({first, other, changed}) == len(log) == 3
