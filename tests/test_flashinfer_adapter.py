"""The FlashInfer adapter: what it keeps of a plan, which calls it takes, what it makes of them, the switch.

Its host code is compiled as it is, with stand-ins for the headers of CUDA and CUTLASS, for FlashInfer's tensor class,
and for the kernel's launch, which notes what it was asked for. So this runs without any of them.
"""

# ruff: noqa: C408 (calls read better with keywords)
from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
AUTO, ALWAYS, NEVER = range(3)
MODULE = "batch_mla_demo_etap_0123456789ab"
FLAGS = [f"-DETAP_MODULE={MODULE}", "-DETAP_MAX_ROWS=48"]

RUNTIME = """
    #pragma once
    #include <cstddef>
    #include <cstring>
    enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
    enum cudaMemcpyKind { cudaMemcpyHostToDevice };
    typedef struct CUstream_st* cudaStream_t;
    inline cudaError_t cudaGetLastError() { return cudaSuccess; }
    inline char const* cudaGetErrorString(cudaError_t) { return "made-up error"; }
    inline cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t n, cudaMemcpyKind, cudaStream_t) {
      std::memcpy(to, from, n);
      return cudaSuccess;
    }
"""
FAST_MATH = """
    #pragma once
    namespace cutlass { struct FastDivmod { int divisor = 0; FastDivmod() = default;
                                            explicit FastDivmod(int d) : divisor(d) {} }; }
"""

SHIM = r"""
#include <exception>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include "etap/flashinfer_adapter.h"
#include "etap/launch.h"
#include "ops/workspace.h"

static std::ostringstream g_seen;
static int g_fail;

template <class T> void show(char const* name, T const& value) {
  g_seen << ", \"" << name << "\": ";
  if constexpr (std::is_pointer_v<T>) g_seen << uintptr_t(value); else g_seen << value;
}
static void show(char const* name, etap::RowStrides const& s) {
  g_seen << ", \"" << name << "\": [" << s.batch << "," << s.token << "," << s.head << "]";
}
static void show(char const* name, cutlass::FastDivmod const& d) { show(name, d.divisor); }

namespace etap {
cudaError_t acquire_workspace(int device, cudaStream_t stream, LaunchConfig const& config, void** workspace) {
  show("device", device), show("workspace_stream", stream);
  show("workspace_for", config.num_ctas * 1000 + config.row_tile);
  *workspace = reinterpret_cast<void*>(uintptr_t(0x9000));
  return cudaSuccess;
}
cudaError_t launch_mla_decode(MlaDecodeParams p, LaunchConfig const& config, cudaStream_t stream) {
  g_seen.precision(9);
  show("stream", stream);
  show("fp16", int(config.dtype == Dtype::kFp16)), show("row_tile", config.row_tile);
  show("p_parts", config.p_parts), show("num_ctas", config.num_ctas);
  show("e4m3", int(config.cache == CacheFormat::kE4m3));
#define SEEN(name) show(#name, p.name);
  @SEEN@
  return g_fail ? cudaErrorInvalidValue : cudaSuccess;
}
}

struct Tensor {  // as much of tvm::ffi::TensorView as the adapter looks at
  struct Type { int code, bits, lanes; };
  struct Device { int device_id; };
  int64_t address = 0;
  Type type{4, 16, 1};
  std::vector<int64_t> sizes, strides;
  int ndim() const { return int(sizes.size()); }
  int64_t size(int64_t d) const { return sizes.at(d); }
  int64_t stride(int64_t d) const { return strides.at(d); }
  Type dtype() const { return type; }
  Device device() const { return {1}; }
  void* data_ptr() const { return reinterpret_cast<void*>(address); }
};

// Lines "t NAME ADDRESS CODE BITS DIM SIZES STRIDES" (tensor), "n NAME VALUE" (number), "fail".
extern "C" char const* shim_run(char const* text) {
  std::map<std::string, Tensor> tensors;
  std::map<std::string, double> numbers;
  g_seen.str("");
  g_fail = 0;
  std::istringstream in(text);
  for (std::string kind, name; in >> kind;) {
    if (kind == "fail") { g_fail = 1; continue; }
    in >> name;
    if (kind == "n") { in >> numbers[name]; continue; }
    Tensor& t = tensors[name];
    int dim;
    in >> t.address >> t.type.code >> t.type.bits >> dim;
    t.sizes.resize(dim), t.strides.resize(dim);
    for (auto& n : t.sizes) in >> n;
    for (auto& n : t.strides) in >> n;
  }
  auto const number = [&](char const* name) { return int64_t(numbers[name]); };
  etap::flashinfer::Requests requests;
  if (number("batch") > 0) requests = {number("offset"), number("batch"), number("longest")};
  std::optional<Tensor> lse;
  if (tensors.count("lse")) lse = tensors["lse"];
  static std::string result;
  try {
    bool const taken = etap::flashinfer::try_run(
        requests, reinterpret_cast<void*>(uintptr_t(0x100000)), tensors["q_nope"], tensors["q_pe"], tensors["ckv"],
        tensors["kpe"], tensors["kv_indices"], tensors["o"], lse, int64_t(numbers["mask_mode"]),
        int64_t(numbers["num_heads"]), int64_t(numbers["page_size"]), numbers["sm_scale"], numbers["base_e"] != 0,
        numbers["ckv_scale"], numbers["kpe_scale"], numbers["scale_arr"] != 0, int64_t(numbers["num_sm"]),
        cudaStream_t(0x5001L));
    result = std::string("{\"taken\": ") + (taken ? "true" : "false") + g_seen.str() + "}";
  } catch (std::exception const& error) {
    result = std::string("{\"error\": \"") + error.what() + "\"}";
  }
  return result.c_str();
}

// Plans `batch` requests behind `used` bytes of a workspace of `bytes`; copies: the older releases' way. Writes what
// the device has to `device`; returns the plan's vector, what run() takes off it, and the bytes in use.
extern "C" char const* shim_plan(int const* qo, int const* kv, int const* len, int batch, int used, int bytes,
                                 int copies, int* device) {
  std::vector<int64_t> plan{1, 132, 0, 16};
  std::vector<char> pinned(bytes, 0);
  int64_t end = used;
  if (copies) {
    etap::flashinfer::append_and_copy_requests(plan, used - 16384 * 4, device, pinned.data(), bytes, qo, kv, len, batch,
                                               nullptr);
  } else {
    end = etap::flashinfer::append_requests(plan, used, pinned.data(), bytes, qo, kv, len, batch);
    std::memcpy(device, pinned.data(), end);
  }
  static std::string result;
  std::ostringstream out;
  out << "{\"plan\": [";
  for (size_t i = 0; i < plan.size(); ++i) out << (i ? "," : "") << plan[i];
  auto const taken = etap::flashinfer::take_requests(plan);
  auto const again = etap::flashinfer::take_requests(plan);
  out << "], \"left\": " << plan.size() << ", \"offset\": " << taken.offset << ", \"batch\": " << taken.batch
      << ", \"longest\": " << taken.longest << ", \"again\": " << again.offset << ", \"end\": " << end << "}";
  result = out.str();
  return result.c_str();
}

extern "C" long shim_plan_int64() {
  std::vector<int64_t> plan{1};
  std::vector<char> pinned(4096);
  int64_t const numbers[3] = {0, 1, 2};
  return long(etap::flashinfer::append_requests(plan, 64, pinned.data(), 4096, numbers, numbers, numbers, 2));
}
"""

SEEN = """
    batch num_heads heads_divmod q_len cu_seqlens_q cache_seqlens causal scale_log2 q_nope q_rope q_nope_stride
    q_rope_stride ckv kpe ckv_page_stride ckv_row_stride kpe_page_stride kpe_row_stride num_pages page_size page_divmod
    capacity page_table page_indptr cache_batch_idx max_pages out out_stride out_fp32 lse lse_stride lse_unit
    workspace ckv_scale kpe_scale ckv_scale_data kpe_scale_data
""".split()  # noqa: SIM905
BF16, FP16, FP32, INT, LONG = (4, 16), (2, 16), (2, 32), (0, 32), (0, 64)
E4M3, E5M2 = (10, 8), (12, 8)


def tensor(address: int, shape: tuple[int, ...], dtype: tuple[int, int] = BF16, strides=None) -> dict[str, Any]:
    """A tensor of the shim; contiguous unless told otherwise."""
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return {"address": address, "dtype": dtype, "shape": shape, "strides": strides}


def call(**changed: Any) -> str:
    """run()'s arguments: 5 tokens of 3 requests, 16 heads, two views of one 576-wide paged cache."""
    given: dict[str, Any] = dict(
        q_nope=tensor(0x1000, (5, 16, 512)), q_pe=tensor(0x2000, (5, 16, 64)), o=tensor(0x3000, (5, 16, 512)),
        ckv=tensor(0x20000, (50, 4, 512), strides=(2304, 576, 1)), lse=tensor(0x4000, (5, 16), FP32),
        kpe=tensor(0x20400, (50, 4, 64), strides=(2304, 576, 1)), kv_indices=tensor(0x6000, (40,), INT),
        mask_mode=1, num_heads=16, page_size=4, sm_scale=0.25, base_e=0, num_sm=132, offset=0x40, batch=3, longest=2,
        ckv_scale=1, kpe_scale=1, scale_arr=0,
    )  # fmt: skip
    given |= changed
    lines = ["fail"] if given.pop("fail", False) else []
    for name, value in given.items():
        if isinstance(value, dict):
            head = (value["address"], *value["dtype"], len(value["shape"]))
            lines.append(" ".join(map(str, ("t", name, *head, *value["shape"], *value["strides"]))))
        elif value is not None:
            lines.append(f"n {name} {float(value)!r}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The adapter's host code, compiled against the stand-ins."""
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if not compiler:
        pytest.skip("not run: no C++ compiler")
    folder = tmp_path_factory.mktemp("flashinfer_adapter")
    (folder / "cutlass").mkdir()
    (folder / "cuda_runtime_api.h").write_text(RUNTIME)
    (folder / "cutlass/fast_math.h").write_text(FAST_MATH)
    (folder / "shim.cpp").write_text(SHIM.replace("@SEEN@", " ".join(f"SEEN({name})" for name in SEEN)))
    output = folder / "libadapter.so"
    command = [compiler, "-std=c++17", "-Wall", "-Werror", "-O0", "-shared", "-fPIC", f"-I{folder}", f"-I{CSRC}"]
    command += [*FLAGS, "-x", "c++", str(folder / "shim.cpp"), str(CSRC / "flashinfer/adapter.cu")]
    run = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return output


class Adapter:
    """The compiled adapter: its C interface, and calls of it."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        for name in ("shim_run", "shim_plan", "etap_flashinfer_reason", "etap_flashinfer_module"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.c.etap_flashinfer_count.restype = ctypes.c_uint64

    def run(self, **changed: Any) -> dict[str, Any]:
        return json.loads(self.c.shim_run(call(**changed).encode()))

    def reasons(self) -> list[str]:
        return [self.c.etap_flashinfer_reason(i).decode() for i in range(self.c.etap_flashinfer_num_reasons())]

    def last_reason(self) -> str:
        return self.c.etap_flashinfer_reason(self.c.etap_flashinfer_last_reason()).decode()

    def plan(self, lengths: list[int], tokens: list[int], *, used=96, size=4096, copies=False):
        """(what the shim says, the device's workspace as int32) of a plan of requests with one page a key."""
        ints = lambda values: (ctypes.c_int * len(values))(*values)  # noqa: E731
        sums = lambda values: [sum(values[:i]) for i in range(len(values) + 1)]  # noqa: E731
        device = ints([-1] * (size // 4))
        arrays = map(ints, (sums(tokens), sums(lengths), lengths))
        answer = self.c.shim_plan(*arrays, len(lengths), used, size, int(copies), device)
        return json.loads(answer), list(device)


@pytest.fixture
def adapter(library: Path, monkeypatch) -> Adapter:
    monkeypatch.delenv("ETAP_FLASHINFER", raising=False)
    made = Adapter(library)
    made.c.etap_flashinfer_set_mode(AUTO)
    made.c.etap_flashinfer_set_max_rows(64)
    made.c.etap_flashinfer_set_p_parts(0)
    made.c.etap_flashinfer_reset_counts()
    return made


# The plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [False, True])
def test_plan_keeps_the_requests(adapter: Adapter, copies: bool) -> None:
    """Both ways of upstream's planner: the arrays reach the device, aligned, behind what upstream uses."""
    used = 16384 * 4 + 20
    said, device = adapter.plan([7, 0, 130], [1, 2, 1], used=used, size=1 << 17, copies=copies)
    offset = -(-used // 16) * 16
    assert said["plan"][:4] == [1, 132, 0, 16] and len(said["plan"]) == 8
    assert (said["offset"], said["batch"], said["longest"], said["left"]) == (offset, 3, 2, 4)
    assert said["again"] == -1  # a plan without our entries is left as it is
    at = offset // 4
    assert device[at : at + 10] == [0, 1, 3, 4, 0, 7, 7, 7, 0, 130]
    assert copies or said["end"] == offset + 40


def test_place_of_the_requests_does_not_depend_on_them(adapter: Adapter) -> None:
    """A captured CUDA graph finds the requests of later plans."""
    one, _ = adapter.plan([1, 2], [1, 1])
    other, _ = adapter.plan([500, 0], [4, 1])
    assert one["offset"] == other["offset"] and one["batch"] == other["batch"]


def test_plan_without_room_stays_upstreams(adapter: Adapter) -> None:
    said, _ = adapter.plan([1] * 100, [1] * 100, used=96, size=1200)
    assert said == {"plan": [1, 132, 0, 16], "left": 4, "offset": -1, "batch": 0, "longest": 0, "again": -1, "end": 96}
    assert adapter.plan([1] * 100, [1] * 100, used=96, size=96 + 1204)[0]["offset"] == 96
    assert adapter.c.shim_plan_int64() == 64  # 64-bit indices: nothing is kept


# What is launched -----------------------------------------------------------------------------------------------------


def test_call(adapter: Adapter) -> None:
    """Lengths and page lists are those in the int workspace; strides and outputs arrive where they should."""
    seen = adapter.run()
    assert seen.pop("scale_log2") == pytest.approx(0.25 / math.log(2))
    assert seen == {
        "taken": True, "device": 1, "stream": 0x5001, "workspace_stream": 0x5001,
        "workspace": 0x9000, "workspace_for": 132032,
        "fp16": 0, "row_tile": 32, "p_parts": 0, "num_ctas": 132,
        "batch": 3, "num_heads": 16, "heads_divmod": 16, "q_len": 2, "causal": 1,
        "cu_seqlens_q": 0x100040, "page_indptr": 0x100050, "cache_seqlens": 0x10005C,
        "q_nope": 0x1000, "q_nope_stride": [0, 8192, 512], "q_rope": 0x2000, "q_rope_stride": [0, 1024, 64],
        "ckv": 0x20000, "ckv_page_stride": 2304, "ckv_row_stride": 576,
        "kpe": 0x20400, "kpe_page_stride": 2304, "kpe_row_stride": 576,
        "num_pages": 50, "page_size": 4, "page_divmod": 4, "capacity": 160, "max_pages": 40,
        "page_table": 0x6000, "cache_batch_idx": 0,
        "out": 0x3000, "out_stride": [0, 8192, 512], "out_fp32": 0,
        "e4m3": 0, "ckv_scale": 1, "kpe_scale": 1, "ckv_scale_data": 0, "kpe_scale_data": 0,
        "lse": 0x4000, "lse_stride": [0, 16, 1], "lse_unit": 1,
    }  # fmt: skip


def test_lse_in_either_base_or_none(adapter: Adapter) -> None:
    assert adapter.run(base_e=1)["lse_unit"] == pytest.approx(math.log(2))
    assert adapter.run(lse=None)["lse"] == 0


def test_causal_is_kept_for_single_tokens(adapter: Adapter) -> None:
    """A CUDA graph keeps what was captured, and its next plan may have longer queries."""
    assert adapter.run(longest=1)["causal"] == 1
    assert adapter.run(mask_mode=0)["causal"] == 0


@pytest.mark.parametrize(
    ("heads", "longest", "tile"), [(8, 1, 8), (16, 1, 16), (3, 3, 16), (32, 1, 32), (33, 1, 64), (16, 4, 64)]
)
def test_row_tile(adapter: Adapter, heads: int, longest: int, tile: int) -> None:
    shape = (5, heads)
    q = dict(q_nope=tensor(0x1000, (*shape, 512)), q_pe=tensor(0x2000, (*shape, 64)), o=tensor(0x3000, (*shape, 512)))
    assert adapter.run(**q, num_heads=heads, longest=longest)["row_tile"] == tile
    e4m3 = dict(ckv=tensor(0x20000, (50, 4, 512), E4M3), kpe=tensor(0x90000, (50, 4, 64), E4M3))
    assert adapter.run(**q, **e4m3, num_heads=heads, longest=longest)["row_tile"] == min(tile, 32)


def test_fp16_and_settings(adapter: Adapter) -> None:
    assert adapter.c.etap_flashinfer_set_p_parts(1) == 0  # which leaves the number to the GPU and the cache
    assert adapter.c.etap_flashinfer_set_p_parts(3) == adapter.c.etap_flashinfer_set_p_parts(-1) == -1
    half = {
        name: tensor(0x1000, shape, FP16)
        for name, shape in {
            "q_nope": (5, 16, 512), "q_pe": (5, 16, 64), "o": (5, 16, 512), "ckv": (50, 4, 512), "kpe": (50, 4, 64),
        }.items()
    }  # fmt: skip
    seen = adapter.run(**half, num_sm=1000)
    assert (seen["fp16"], seen["p_parts"], seen["num_ctas"]) == (1, 1, 256)


@pytest.mark.parametrize("query", [BF16, FP16])
def test_e4m3_cache(adapter: Adapter, query: tuple[int, int]) -> None:
    """16-bit queries, strides in elements, the scales as given."""
    given = {
        name: tensor(0x1000, shape, query)
        for name, shape in {"q_nope": (5, 16, 512), "q_pe": (5, 16, 64), "o": (5, 16, 512)}.items()
    }
    given |= dict(ckv=tensor(0x20000, (50, 4, 512), E4M3), kpe=tensor(0x90000, (50, 4, 64), E4M3))
    seen = adapter.run(**given, ckv_scale=0.5, kpe_scale=2)
    assert (seen["e4m3"], seen["fp16"]) == (1, int(query == FP16))
    assert (seen["ckv_scale"], seen["kpe_scale"], seen["ckv_scale_data"], seen["kpe_scale_data"]) == (0.5, 2, 0, 0)
    assert (seen["ckv_row_stride"], seen["kpe_page_stride"]) == (512, 256)


# What is left to upstream ---------------------------------------------------------------------------------------------

REFUSED = {
    "nothing to compute": dict(q_nope=tensor(0x1000, (0, 16, 512))),
    "dtype": dict(ckv=tensor(0x20000, (50, 4, 512), E4M3)),
    "dtype: query": dict(o=tensor(0x3000, (5, 16, 512), FP16)),
    "dtype: query and": dict(ckv=tensor(0x20000, (50, 4, 512), E5M2), kpe=tensor(0x20400, (50, 4, 64), E5M2)),
    "ckv_scale_arr": dict(ckv=tensor(0x20000, (50, 4, 512), E4M3), kpe=tensor(0x20400, (50, 4, 64), E4M3), scale_arr=1),
    "head dimensions": dict(q_pe=tensor(0x2000, (5, 16, 0)), kpe=tensor(0x2000, (50, 4, 0))),
    "head dimensions: not": dict(q_nope=tensor(0x1000, (5, 16, 256)), ckv=tensor(0x2000, (50, 4, 256))),
    "mask mode": dict(mask_mode=2),
    "plan: holds no requests": dict(batch=0),
    "rows": dict(longest=5),
    "kv_indices": dict(kv_indices=tensor(0x6000, (40,), LONG)),
    "caches": dict(page_size=8),
    "caches: not": dict(kpe=tensor(0x20400, (49, 4, 64))),
    "a tensor's last dimension": dict(ckv=tensor(0x20000, (50, 4, 512), strides=(4, 1, 200))),
    "sm_scale": dict(sm_scale=0.0),
    "q_nope, q_pe or out": dict(q_nope=tensor(0x1008, (5, 16, 512))),
    "q_nope, q_pe or out: rows": dict(q_pe=tensor(0x2000, (5, 16, 64), strides=(1088, 68, 1))),
    "plan: no SM": dict(num_sm=0),
}


@pytest.mark.parametrize(("begins", "changed"), REFUSED.items())
def test_refused_calls(adapter: Adapter, begins: str, changed: dict[str, Any]) -> None:
    assert adapter.run(**changed) == {"taken": False}
    assert adapter.last_reason().startswith(begins)
    assert adapter.c.etap_flashinfer_count(adapter.c.etap_flashinfer_last_reason()) == 1
    adapter.c.etap_flashinfer_set_mode(ALWAYS)
    said = adapter.run(**changed)
    if begins == "nothing to compute":
        assert said == {"taken": False}
    else:
        assert said["error"].startswith("ETAP_FLASHINFER=always, but ETAP cannot run this call: " + begins)


def test_every_reason_is_reached_or_named() -> None:
    """REFUSED covers all of them but the switch and the profiler, which have tests of their own."""
    text = (CSRC / "flashinfer/call.h").read_text()
    names = text.split("kReasons[] = {")[1].split("};")[0].split('"')[1::2]
    reached = {name for name in names if any(name.startswith(begins) for begins in REFUSED)}
    assert set(names) - reached == {"taken", "switched off", next(n for n in names if n.startswith("profiler"))}


# The switch -----------------------------------------------------------------------------------------------------------


def test_switch_and_counts(adapter: Adapter) -> None:
    assert adapter.c.etap_flashinfer_set_mode(NEVER) == AUTO
    assert adapter.run() == {"taken": False}
    assert adapter.last_reason() == "switched off"
    assert adapter.c.etap_flashinfer_set_mode(7) == -2
    assert adapter.c.etap_flashinfer_set_mode(ALWAYS) == NEVER
    assert adapter.run()["taken"] and adapter.run()["taken"]
    assert [adapter.c.etap_flashinfer_count(i) for i in range(3)] == [2, 0, 1]
    assert adapter.c.etap_flashinfer_count(99) == 0 and adapter.c.etap_flashinfer_reason(99) is None
    adapter.c.etap_flashinfer_reset_counts()
    assert adapter.c.etap_flashinfer_count(0) == 0


def test_row_limit(adapter: Adapter, library: Path, tmp_path: Path) -> None:
    fresh = ctypes.CDLL(str(shutil.copy(library, tmp_path)))
    assert fresh.etap_flashinfer_set_max_rows(16) == 48
    assert adapter.c.etap_flashinfer_set_max_rows(16) == 64
    assert adapter.run() == {"taken": False}
    assert adapter.c.etap_flashinfer_set_max_rows(-1) == -1


def test_module_says_its_name(adapter: Adapter) -> None:
    assert adapter.c.etap_flashinfer_module().decode() == MODULE


def test_launch_error_is_raised(adapter: Adapter) -> None:
    assert adapter.run(fail=True) == {"error": "ETAP: launch: made-up error"}


@pytest.mark.parametrize(("value", "mode"), [("never", NEVER), ("always", ALWAYS), ("", AUTO), ("sometimes", -1)])
def test_environment_variable(library: Path, value: str, mode: int) -> None:
    """Read once, at the first call, so each value has a process of its own."""
    script = (
        "import ctypes, sys\nc = ctypes.CDLL(sys.argv[1])\nc.shim_run.restype = ctypes.c_char_p\n"
        "print(c.etap_flashinfer_mode())\nprint(c.shim_run(sys.argv[2].encode()).decode())"
    )
    environment = {**os.environ, "ETAP_FLASHINFER": value}
    ran = subprocess.run(
        ["python3", "-c", script, str(library), call()], env=environment, capture_output=True, text=True, check=True
    )
    said, answer = ran.stdout.splitlines()
    assert int(said) == mode
    if mode == -1:
        assert "expected auto, always or never" in json.loads(answer)["error"]


def test_profiling_modules_are_upstreams(tmp_path, library: Path) -> None:
    """A module built to profile upstream's kernel runs it."""
    folder = library.parent
    compiler = os.environ.get("CXX", "c++").split()[0]
    output = tmp_path / "libprofiled.so"
    command = [compiler, "-std=c++17", "-O0", "-shared", "-fPIC", f"-I{folder}", f"-I{CSRC}", *FLAGS]
    command += [
        "-DFLASHINFER_ENABLE_PROFILER",
        "-x",
        "c++",
        str(folder / "shim.cpp"),
        str(CSRC / "flashinfer/adapter.cu"),
    ]
    subprocess.run([*command, "-o", str(output)], check=True)
    profiled = Adapter(output)
    assert profiled.run() == {"taken": False}
    assert profiled.last_reason().startswith("profiler")
