"""The FlashAttention-3 adapter: which calls it takes, what it makes of them, the switch; and that all of it compiles.

Its host code is compiled as it is, with stand-ins for the headers of CUDA, torch, CUTLASS and upstream, and for the
kernel's launch, which notes what it was asked for. So this runs without any of them.
"""

# ruff: noqa: C408, SIM905 (calls read better with keywords, long lists as words)
from __future__ import annotations

import ctypes
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from etap_integration.patching import fetching, series
from etap_integration.patching.manifest import load_manifest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "tools"))
import etap_build  # noqa: E402  (needs the path above)

AUTO, ALWAYS, NEVER = range(3)

STAND_INS = {
    "cuda_runtime_api.h": """
        #pragma once
        #include <cstddef>
        enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
        typedef struct CUstream_st* cudaStream_t;
        inline cudaError_t cudaGetLastError() { return cudaSuccess; }
        inline char const* cudaGetErrorString(cudaError_t) { return "made-up error"; }
    """,
    "cutlass/fast_math.h": """
        #pragma once
        namespace cutlass { struct FastDivmod {}; }
    """,
    "flash.h": """
        #pragma once
        #include <cstdint>
        struct Flash_fwd_params {
          void *q_ptr, *k_ptr, *v_ptr, *o_ptr, *softmax_lse_ptr;
          int64_t q_batch_stride, k_batch_stride, v_batch_stride, o_batch_stride, q_row_stride, k_row_stride;
          int64_t v_row_stride, o_row_stride, q_head_stride, o_head_stride, page_table_batch_stride;
          int b, b_k, h, h_k, d, dv, seqlen_q, seqlen_k, total_q, total_k, page_size, num_pages, attention_chunk;
          int arch, num_sm;
          float scale_softmax, softcap;
          int *cu_seqlens_q, *cu_seqlens_k, *leftpad_k, *seqused_q, *seqused_k, *page_table;
          bool is_bf16, is_e4m3, is_causal, is_local;
        };
    """,
    "ATen/ATen.h": """
        #pragma once
        #include <cstdint>
        #include <vector>
        namespace at {
        enum class ScalarType { Half, BFloat16, Int, Long, Float, Float8_e4m3fn };
        struct Tensor {
          int64_t address = 0;
          int type = 0, cuda = 1, device = 0;
          std::vector<int64_t> sizes, strides;
          int64_t dim() const { return sizes.size(); }
          int64_t size(int64_t d) const { return sizes.at(d < 0 ? d + dim() : d); }
          int64_t stride(int64_t d) const { return strides.at(d < 0 ? d + dim() : d); }
          ScalarType scalar_type() const { return ScalarType(type); }
          int64_t numel() const {
            int64_t n = 1;
            for (auto size : sizes) n *= size;
            return n;
          }
          bool is_cuda() const { return cuda; }
          int get_device() const { return device; }
          bool is_contiguous() const {
            int64_t step = 1;
            for (int64_t d = dim() - 1; d >= 0; step *= sizes[d--]) if (strides[d] != step) return false;
            return true;
          }
          void* data_ptr() const { return reinterpret_cast<void*>(address); }
        };
        }
    """,
    "ATen/cuda/CUDAContextLight.h": """
        #pragma once
        namespace at::cuda {
        struct Stream { int device; cudaStream_t stream() const { return cudaStream_t(0x5000L + device); } };
        inline Stream getCurrentCUDAStream(int device) { return {device}; }
        }
    """,
}

# Names that the test gives values to, or reads back, are pasted in from the tables below.
SHIM = r"""
#include <exception>
#include <map>
#include <sstream>
#include <string>
#include <type_traits>
#include "etap/fa3_adapter.h"
#include "etap/launch.h"
#include "ops/workspace.h"

static std::ostringstream g_seen;
static int g_fail;

template <class T> void assign(T& field, double value) {
  if constexpr (std::is_pointer_v<T>) field = reinterpret_cast<T>(uintptr_t(value)); else field = T(value);
}
template <class T> void show(char const* name, T const& value) {
  g_seen << ", \"" << name << "\": ";
  if constexpr (std::is_pointer_v<T>) g_seen << uintptr_t(value); else g_seen << value;
}
static void show(char const* name, etap::RowStrides const& s) {
  g_seen << ", \"" << name << "\": [" << s.batch << "," << s.token << "," << s.head << "]";
}

namespace etap {
cudaError_t acquire_workspace(int device, cudaStream_t stream, LaunchConfig const& c, void** workspace) {
  show("device", device), show("workspace_stream", stream);
  show("workspace_bytes", workspace_bytes(c.num_ctas, c.row_tile));
  *workspace = reinterpret_cast<void*>(uintptr_t(0x9000));
  return cudaSuccess;
}
cudaError_t launch_mla_decode(MlaDecodeParams p, LaunchConfig const& config, cudaStream_t stream) {
  g_seen.precision(9);
  show("stream", stream);
  show("fp16", int(config.dtype == Dtype::kFp16)), show("row_tile", config.row_tile);
  show("e4m3", int(config.cache == CacheFormat::kE4m3));
  show("p_parts", config.p_parts), show("num_ctas", config.num_ctas);
#define SEEN(name) show(#name, p.name);
  @SEEN@
  return g_fail ? cudaErrorInvalidValue : cudaSuccess;
}
}

// Lines "f NAME VALUE" (parameter), "t NAME ADDRESS TYPE CUDA DEVICE DIM SIZES STRIDES" (tensor), "appends", "fail".
extern "C" char const* shim_call(char const* text) {
  Flash_fwd_params f{};
  std::map<std::string, at::Tensor> tensors;
  bool appends = false;
  g_seen.str("");
  g_fail = 0;
  std::istringstream in(text);
  for (std::string kind, name; in >> kind;) {
    if (kind == "appends") { appends = true; continue; }
    if (kind == "fail") { g_fail = 1; continue; }
    in >> name;
    if (kind == "f") {
      double value;
      in >> value;
#define GIVEN(field) if (name == #field) assign(f.field, value);
      @GIVEN@
    } else {
      at::Tensor& t = tensors[name];
      int dim;
      in >> t.address >> t.type >> t.cuda >> t.device >> dim;
      t.sizes.resize(dim), t.strides.resize(dim);
      for (auto& n : t.sizes) in >> n;
      for (auto& n : t.strides) in >> n;
    }
  }
  auto const given = [&](char const* name) {
    return tensors.count(name) ? std::optional<at::Tensor>(tensors[name]) : std::nullopt;
  };
  static std::string result;
  auto const &q = tensors["q"], &k = tensors["k"], &v = tensors["v"];
  auto const q_descale = given("q_descale"), k_descale = given("k_descale"), v_descale = given("v_descale");
  try {
    // As the patched mha_fwd has it: its check of dtypes, or ETAP and then the check.
    auto const check = [&] {
      if (k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type()) throw std::runtime_error("dtypes");
    };
    bool const put_off = etap::fa3::may_widen(q, k, v, given("qv"));
    if (!put_off) check();
    bool const taken = etap::fa3::try_run(f, q, k, v, given("qv"), given("kv_batch_idx"),
                                          {q_descale, k_descale, v_descale}, appends, 0);
    if (!taken) check();
    result = std::string("{\"taken\": ") + (taken ? "true" : "false") + g_seen.str() + "}";
  } catch (std::exception const& error) {
    result = std::string("{\"error\": \"") + error.what() + "\"}";
  }
  return result.c_str();
}
"""

SEEN = """
    batch num_heads q_len cu_seqlens_q cache_seqlens causal scale_log2 q_nope q_rope q_nope_stride
    q_rope_stride ckv kpe ckv_page_stride ckv_row_stride kpe_page_stride kpe_row_stride num_pages page_size
    capacity page_table cache_batch_idx page_table_stride max_pages out out_stride out_fp32 lse lse_stride lse_unit
    workspace ckv_scale kpe_scale ckv_scale_data kpe_scale_data ckv_scale_stride kpe_scale_stride
""".split()
GIVEN = """
    q_ptr k_ptr v_ptr o_ptr softmax_lse_ptr q_batch_stride k_batch_stride v_batch_stride o_batch_stride q_row_stride
    k_row_stride v_row_stride o_row_stride q_head_stride o_head_stride page_table_batch_stride b b_k h h_k d dv seqlen_q
    seqlen_k total_q total_k page_size num_pages attention_chunk arch num_sm scale_softmax softcap cu_seqlens_q
    cu_seqlens_k leftpad_k seqused_q seqused_k page_table is_bf16 is_e4m3 is_causal is_local
""".split()
HALF, BF16, INT, LONG, FLOAT, E4M3 = range(6)


def tensor(address: int, shape: tuple[int, ...], dtype: int = BF16, *, strides=None, cuda=1, device=1) -> dict:
    """A tensor of the shim; contiguous unless told otherwise."""
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return {"address": address, "shape": shape, "dtype": dtype, "strides": strides, "cuda": cuda, "device": device}


class Adapter:
    """The compiled adapter: its C interface, and calls of it."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        self.c.shim_call.restype = ctypes.c_char_p
        self.c.etap_fa3_reason.restype = ctypes.c_char_p
        self.c.etap_fa3_count.restype = ctypes.c_uint64

    def run(self, call: Call) -> dict[str, Any]:
        """try_run's answer, and what the kernel was launched with if it was."""
        return json.loads(self.c.shim_call(call.text().encode()))

    def reasons(self) -> list[str]:
        return [self.c.etap_fa3_reason(i).decode() for i in range(self.c.etap_fa3_num_reasons())]

    def last_reason(self) -> str:
        return self.c.etap_fa3_reason(self.c.etap_fa3_last_reason()).decode()

    def counts(self) -> dict[str, int]:
        counts = {name: self.c.etap_fa3_count(i) for i, name in enumerate(self.reasons())}
        return {name: count for name, count in counts.items() if count}


class Call:
    """mha_fwd's state where the patch asks ETAP: two views of one 576-wide paged buffer, 3 requests of 2 x 16 rows."""

    def __init__(self, **changed: Any) -> None:
        self.fields = dict(
            q_ptr=0x1000, k_ptr=0x20400, v_ptr=0x20000, o_ptr=0x3000, softmax_lse_ptr=0x4000,
            q_batch_stride=2 * 16 * 64, q_row_stride=16 * 64, q_head_stride=64,
            o_batch_stride=2 * 16 * 512, o_row_stride=16 * 512, o_head_stride=512,
            k_batch_stride=4 * 576, v_batch_stride=4 * 576, k_row_stride=576, v_row_stride=576,
            b=3, b_k=3, h=16, h_k=1, d=64, dv=512, seqlen_q=2, seqlen_k=28, total_q=6, total_k=12,
            page_table=0x6000, page_table_batch_stride=9, page_size=4, num_pages=50, seqused_k=0x7000,
            arch=90, num_sm=100, scale_softmax=0.25, is_bf16=1, is_causal=1,
        )  # fmt: skip
        self.tensors = {"q": tensor(0x1000, (3, 2, 16, 64)), "qv": tensor(0x8000, (3, 2, 16, 512)), **caches(BF16)}
        self.flags: list[str] = []
        for name, value in changed.items():
            if isinstance(value, dict):
                self.tensors[name] = value
            elif name in ("appends", "fail"):
                self.flags.append(name)
            elif value is None:
                del self.tensors[name]
            else:
                assert name in GIVEN, name
                self.fields[name] = value

    def text(self) -> str:
        lines = [f"f {name} {float(value)!r}" for name, value in self.fields.items()] + self.flags
        for name, t in self.tensors.items():
            head = (t["address"], t["dtype"], t["cuda"], t["device"], len(t["shape"]))
            lines.append(" ".join(map(str, ("t", name, *head, *t["shape"], *t["strides"]))))
        return "\n".join(lines)


def caches(dtype: int) -> dict[str, dict]:
    """Only dtypes count: the rest is in upstream's parameters."""
    return {"k": tensor(0x20400, (50, 4, 1, 64), dtype), "v": tensor(0x20000, (50, 4, 1, 512), dtype)}


def e4m3(**changed: Any) -> Call:
    """The same with an e4m3 cache."""
    return Call(**{**caches(E4M3), **changed})


def ragged(**changed: Any) -> Call:
    """The same with (total_q, heads, column) queries; upstream leaves batch strides at 0 then."""
    return Call(
        **{
            **dict(
                cu_seqlens_q=0xA000, q_batch_stride=0, o_batch_stride=0, total_q=5,
                q=tensor(0x1000, (5, 16, 64)), qv=tensor(0x8000, (5, 16, 512)),
            ),
            **changed,
        }
    )  # fmt: skip


def unpaged(**changed: Any) -> Call:
    """The same with a cache of 7 requests x 40 keys."""
    cache = dict(page_table=0, page_table_batch_stride=0, page_size=1, num_pages=0, b_k=7, seqlen_k=40, total_k=120)
    strides = dict(k_batch_stride=40 * 576, v_batch_stride=40 * 576)
    return Call(**{**cache, **strides, **changed})


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The adapter's host code, compiled against the stand-ins."""
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if not compiler:
        pytest.skip("not run: no C++ compiler")
    folder = tmp_path_factory.mktemp("fa3_adapter")
    for name, text in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    shim = SHIM.replace("@SEEN@", " ".join(f"SEEN({name})" for name in SEEN))
    (folder / "shim.cpp").write_text(shim.replace("@GIVEN@", " ".join(f"GIVEN({name})" for name in GIVEN)))
    output = folder / "libadapter.so"
    command = [compiler, "-std=c++17", "-Wall", "-Werror", "-O0", "-shared", "-fPIC", f"-I{folder}", f"-I{CSRC}"]
    command += ["-x", "c++", str(folder / "shim.cpp"), str(CSRC / "fa3/adapter_sm90.cu"), "-o", str(output)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return output


@pytest.fixture
def adapter(library: Path, monkeypatch) -> Adapter:
    monkeypatch.delenv("ETAP_FA3", raising=False)
    made = Adapter(library)
    made.c.etap_fa3_set_mode(AUTO)
    made.c.etap_fa3_set_max_rows(64)
    made.c.etap_fa3_set_only_where_faster(0)
    made.c.etap_fa3_set_p_parts(0)
    made.c.etap_fa3_reset_counts()
    return made


# What is launched -----------------------------------------------------------------------------------------------------


def test_paged_call(adapter: Adapter) -> None:
    """K is the rope part, V the latent part; lengths, page table, strides and outputs arrive where they should."""
    seen = adapter.run(Call())
    assert seen.pop("scale_log2") == pytest.approx(0.25 / math.log(2))
    assert seen.pop("lse_unit") == pytest.approx(math.log(2))
    assert seen.pop("workspace_bytes") >= 4096
    assert seen == {
        "taken": True, "device": 1, "stream": 0x5001, "workspace_stream": 0x5001, "workspace": 0x9000,
        "fp16": 0, "row_tile": 32, "e4m3": 0, "p_parts": 0, "num_ctas": 100,
        "batch": 3, "num_heads": 16, "q_len": 2, "cu_seqlens_q": 0, "cache_seqlens": 0x7000,
        "causal": 1,
        "q_rope": 0x1000, "q_rope_stride": [2048, 1024, 64], "q_nope": 0x8000, "q_nope_stride": [16384, 8192, 512],
        "ckv": 0x20000, "ckv_page_stride": 2304, "ckv_row_stride": 576,
        "kpe": 0x20400, "kpe_page_stride": 2304, "kpe_row_stride": 576,
        "num_pages": 50, "page_size": 4, "capacity": 28, "max_pages": 7,
        "page_table": 0x6000, "page_table_stride": 9, "cache_batch_idx": 0,
        "out": 0x3000, "out_stride": [16384, 8192, 512], "out_fp32": 0, "lse": 0x4000, "lse_stride": [32, 1, 2],
        "ckv_scale": 1, "kpe_scale": 1, "ckv_scale_data": 0, "kpe_scale_data": 0, "ckv_scale_stride": 0,
        "kpe_scale_stride": 0,
    }  # fmt: skip
    assert adapter.last_reason() == "taken" and adapter.counts() == {"taken": 1}


def test_ragged_call(adapter: Adapter) -> None:
    """LSE is (heads, total_q) then, and no tensor has a batch stride."""
    seen = adapter.run(ragged())
    assert seen["taken"] and seen["cu_seqlens_q"] == 0xA000 and seen["q_len"] == 2 and seen["batch"] == 3
    assert seen["lse_stride"] == [0, 1, 5]
    assert seen["q_rope_stride"] == [0, 1024, 64] and seen["q_nope_stride"] == [0, 8192, 512]
    assert seen["out_stride"] == [0, 8192, 512]


def test_unpaged_call(adapter: Adapter) -> None:
    """One page per request of the cache, of which cache_batch_idx may choose."""
    seen = adapter.run(unpaged(b_k=3))
    assert seen["taken"] and seen["page_table"] == 0 and seen["cache_batch_idx"] == 0
    assert (seen["num_pages"], seen["page_size"], seen["capacity"], seen["ckv_page_stride"]) == (3, 40, 40, 40 * 576)
    seen = adapter.run(unpaged(kv_batch_idx=tensor(0xB000, (3,), INT)))
    assert seen["taken"] and seen["cache_batch_idx"] == 0xB000 and seen["num_pages"] == 7


def test_configuration(adapter: Adapter) -> None:
    seen = adapter.run(
        Call(
            **caches(HALF), is_bf16=0, q=tensor(0x1000, (3, 2, 16, 64), HALF), qv=tensor(0x8000, (3, 2, 16, 512), HALF)
        )
    )
    assert seen["taken"] and seen["fp16"] == 1
    for heads, q_len, tile in ((8, 1, 8), (16, 1, 16), (4, 4, 16), (32, 1, 32), (33, 1, 64), (16, 4, 64)):
        shape = (3, q_len, heads)
        call = Call(h=heads, seqlen_q=q_len, q=tensor(0x1000, (*shape, 64)), qv=tensor(0x8000, (*shape, 512)))
        assert adapter.run(call)["row_tile"] == tile
        assert adapter.run(call)["causal"] == (q_len > 1)
    assert adapter.run(Call(num_sm=1000))["num_ctas"] <= 256  # what the workspace has counters for
    assert adapter.c.etap_fa3_set_p_parts(1) == 0 and adapter.run(Call())["p_parts"] == 1
    assert adapter.c.etap_fa3_set_p_parts(3) == adapter.c.etap_fa3_set_p_parts(-1) == -1


# An e4m3 cache --------------------------------------------------------------------------------------------------------

PER_REQUEST = [  # descales of 3 requests, and the stride that the kernel gets
    (tensor(0xD000, (3, 1), FLOAT), 1),
    (tensor(0xD000, (3, 1), FLOAT, strides=[0, 0]), 0),  # one value, expanded
    (tensor(0xD000, (3, 1), FLOAT, strides=[7, 3]), 7),
    (tensor(0xD000, (3,), FLOAT, strides=[2]), 2),
    (tensor(0xD000, (), FLOAT), 0),
    (tensor(0xD000, (1,), FLOAT, strides=[5]), 0),
]


def scales(seen: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in seen.items() if "_scale" in name and value}


@pytest.mark.parametrize(("descale", "stride"), PER_REQUEST)
def test_e4m3_cache(adapter: Adapter, descale: dict, stride: int) -> None:
    """v_descale is the latent's, k_descale the rope part's."""
    same = adapter.run(Call())
    seen = adapter.run(e4m3(v_descale=descale, k_descale={**descale, "address": 0xE000}))
    found = {"ckv_scale": 1, "kpe_scale": 1, "ckv_scale_data": 0xD000, "kpe_scale_data": 0xE000}
    strides = {"ckv_scale_stride": stride, "kpe_scale_stride": stride}
    assert seen == same | {"e4m3": 1} | found | strides
    assert adapter.counts() == {"taken": 2}


def test_e4m3_cache_with_one_descale_or_none(adapter: Adapter) -> None:
    """What is not given is 1, whatever the other."""
    assert scales(adapter.run(e4m3())) == {"ckv_scale": 1, "kpe_scale": 1}
    descale = tensor(0xD000, (3, 1), FLOAT)
    for name, part in (("k_descale", "kpe"), ("v_descale", "ckv")):
        found = {f"{part}_scale_data": 0xD000, f"{part}_scale_stride": 1}
        assert scales(adapter.run(e4m3(**{name: descale}))) == {"ckv_scale": 1, "kpe_scale": 1} | found


def test_e4m3_cache_beside_half_queries(adapter: Adapter) -> None:
    q = {"q": tensor(0x1000, (3, 2, 16, 64), HALF), "qv": tensor(0x8000, (3, 2, 16, 512), HALF)}
    seen = adapter.run(e4m3(**q, is_bf16=0))
    assert seen["taken"] and seen["fp16"] == seen["e4m3"] == 1 and seen["p_parts"] == 0  # the launch makes that 1


def test_descales_beside_a_16_bit_cache_have_no_effect(adapter: Adapter) -> None:
    """Upstream does not look at them either."""
    descale = tensor(0xD000, (3, 1), FLOAT)
    assert adapter.run(Call(q_descale=descale, k_descale=descale, v_descale=descale)) == adapter.run(Call())


BAD_DESCALES = [
    {"q_descale": tensor(0xD000, (3, 1), FLOAT)},
    *(
        {name: bad}
        for name in ("k_descale", "v_descale")
        for bad in (
            tensor(0xD000, (3, 1), BF16),
            tensor(0xD000, (2, 1), FLOAT),
            tensor(0xD000, (3, 2), FLOAT),
            tensor(0xD000, (3, 1, 1), FLOAT),
            tensor(0xD000, (0,), FLOAT),
            tensor(0xD000, (3, 1), FLOAT, cuda=0),
            tensor(0xD000, (3, 1), FLOAT, device=0),
        )
    ),
]


@pytest.mark.parametrize("changed", BAD_DESCALES)
def test_other_descales(adapter: Adapter, changed: dict[str, dict]) -> None:
    assert adapter.run(e4m3(**changed)) == {"error": "dtypes"} and adapter.last_reason().startswith("descale: ")


def test_e4m3_calls_that_etap_does_not_take_end_in_upstreams_error(adapter: Adapter) -> None:
    """Never in upstream's kernel: refused, switched off, too many rows, empty."""
    refused = ((reason, changed) for reason, changed in REFUSED.items() if reason != "dtype")
    for reason, changed in (*refused, ("nothing to compute", {"total_q": 0}), ("qv: ", {"qv": tensor(0, (3,))})):
        assert adapter.run(e4m3(**changed)) == {"error": "dtypes"}, reason
        assert adapter.last_reason().startswith(reason)
    adapter.c.etap_fa3_set_mode(NEVER)
    assert adapter.run(e4m3()) == {"error": "dtypes"} and adapter.last_reason() == "switched off"
    adapter.c.etap_fa3_set_mode(ALWAYS)
    assert adapter.run(e4m3())["taken"]
    assert adapter.run(e4m3(total_q=0)) == {"error": "dtypes"}  # empty: as for any cache, ETAP's switch says nothing
    message = "ETAP_FA3=always, but ETAP cannot run this call: window_size"
    assert adapter.run(e4m3(is_local=1)) == {"error": message}


@pytest.mark.parametrize(
    "changed",
    [
        {"k": tensor(0x20400, (50, 4, 1, 64), BF16)},
        {"v": tensor(0x20000, (50, 4, 1, 512), BF16)},
        {"qv": None},
        {"q": tensor(0x1000, (3, 2, 16, 64), INT)},
        {"k": tensor(0x20400, (50, 4, 1, 64), HALF), "v": tensor(0x20000, (50, 4, 1, 512), HALF)},
    ],
)
def test_other_dtypes_get_upstreams_error_at_once(adapter: Adapter, changed: dict) -> None:
    assert adapter.run(e4m3(**changed)) == {"error": "dtypes"} and adapter.counts() == {}


def test_no_upstream_is_faster_with_an_e4m3_cache(adapter: Adapter) -> None:
    """Upstream has no kernel for it."""
    adapter.c.etap_fa3_set_only_where_faster(1)
    for changed in ({"h": 16, "seqlen_q": 3}, {"b": 5, "h": 16, "seqlen_q": 3}):
        assert adapter.run(Call(**changed)) == {"taken": False}
        assert adapter.run(e4m3(**changed))["taken"]


# What is not ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "GPU": dict(arch=89),
    "dtype": dict(is_e4m3=1),
    "head dimensions": dict(dv=256, qv=tensor(0x8000, (3, 2, 16, 256))),
    "KV heads": dict(h_k=2),
    "rows": dict(h=33, q=tensor(0x1000, (3, 2, 33, 64)), qv=tensor(0x8000, (3, 2, 33, 512))),
    "attention_chunk": dict(attention_chunk=16, is_local=1),
    "window_size": dict(is_local=1),
    "softcap": dict(softcap=30.0),
    "leftpad_k": dict(leftpad_k=0xC000),
    "k_new or rotary_cos": dict(appends=True),
    "cu_seqlens_k": dict(cu_seqlens_k=0xC000),
    "seqused_k (cache_seqlens): not given": dict(seqused_k=0),
    "seqused_q": dict(seqused_q=0xC000),
    "kv_batch_idx (cache_batch_idx) with page_table": dict(kv_batch_idx=tensor(0xB000, (3,), INT)),
    "softmax_scale": dict(scale_softmax=0.0),
    "sm_margin": dict(num_sm=0),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_upstream_runs(adapter: Adapter, reason: str) -> None:
    """auto: upstream runs it and the reason is counted. always: an error that names the reason."""
    call = Call(**REFUSED[reason])
    assert adapter.run(call) == {"taken": False}
    assert adapter.last_reason().startswith(reason)
    assert adapter.counts() == {adapter.last_reason(): 1}
    adapter.c.etap_fa3_set_mode(ALWAYS)
    assert adapter.run(call) == {"error": f"ETAP_FA3=always, but ETAP cannot run this call: {adapter.last_reason()}"}


@pytest.mark.parametrize(
    "qv",
    [
        tensor(0x8000, (3, 2, 16, 512), HALF),
        tensor(0x8000, (3, 2, 16, 512), cuda=0),
        tensor(0x8000, (3, 2, 16, 512), device=0),
        tensor(0x8000, (3, 2, 16, 256)),
        tensor(0x8000, (3, 2, 8, 512)),
        tensor(0x8000, (6, 16, 512)),
        tensor(0x8000, (3, 2, 16, 512), strides=[16384, 8192, 1, 16]),
    ],
)
def test_malformed_qv_is_left_to_upstreams_check(adapter: Adapter, qv: dict) -> None:
    assert adapter.run(Call(qv=qv)) == {"taken": False}
    assert adapter.last_reason().startswith("qv: ")


@pytest.mark.parametrize(
    "index",
    [
        tensor(0xB000, (3,), LONG),
        tensor(0xB000, (2,), INT),
        tensor(0xB000, (3,), INT, strides=[2]),
        tensor(0xB000, (3,), INT, cuda=0),
        tensor(0xB000, (3,), INT, device=0),
    ],
)
def test_malformed_batch_index_is_left_to_upstream(adapter: Adapter, index: dict) -> None:
    assert adapter.run(unpaged(kv_batch_idx=index)) == {"taken": False}
    assert adapter.last_reason().startswith("kv_batch_idx (cache_batch_idx): ")


def test_alignment(adapter: Adapter) -> None:
    """Rows of queries and output begin at multiples of 16 bytes; strides of single entries do not matter."""
    for changed in (
        dict(o_ptr=0x3008),
        dict(o_row_stride=16 * 512 + 4),
        dict(q_head_stride=68),
        dict(qv=tensor(0x8002, (3, 2, 16, 512))),
        dict(qv=tensor(0x8000, (3, 2, 16, 512), strides=[16385, 8192, 512, 1])),
    ):
        assert adapter.run(Call(**changed)) == {"taken": False}, changed
        assert "16-byte aligned" in adapter.last_reason()
    one = dict(b=1, b_k=1, h=1, seqlen_q=1, q=tensor(0x1000, (1, 1, 1, 64)))
    odd = dict(q_batch_stride=1, q_row_stride=3, q_head_stride=5, o_batch_stride=7, o_row_stride=9, o_head_stride=11)
    qv = tensor(0x8000, (1, 1, 1, 512), strides=[1, 1, 1, 1])
    assert adapter.run(Call(**one, **odd, qv=qv))["taken"]
    single = dict(total_q=1, q=tensor(0x1000, (1, 16, 64)), qv=tensor(0x8000, (1, 16, 512)))
    assert adapter.run(ragged(**single, q_row_stride=3, o_row_stride=5))["taken"]
    assert not adapter.run(ragged(q_row_stride=3))["taken"]
    assert adapter.run(Call(k_ptr=0x20402, k_row_stride=577))["taken"]  # a cache of any strides


@pytest.mark.parametrize(
    "changed", [{"total_q": 0}, {"total_k": 0}, {"b": 0}, {"seqlen_k": 0}, {"num_pages": 0}, {"page_size": 0}]
)
def test_empty_calls_are_upstreams_in_every_mode(adapter: Adapter, changed: dict) -> None:
    for mode in (AUTO, ALWAYS, NEVER):
        adapter.c.etap_fa3_set_mode(mode)
        assert adapter.run(Call(**changed)) == {"taken": False}


def test_calls_without_qv_are_upstreams_in_every_mode(adapter: Adapter) -> None:
    """They are not MLA: a library that also serves other attention keeps working under `always`."""
    for mode in (AUTO, ALWAYS, NEVER):
        adapter.c.etap_fa3_set_mode(mode)
        assert adapter.run(Call(qv=None)) == {"taken": False}
    assert adapter.counts() == {"not MLA: no qv": 3}


# The switch -----------------------------------------------------------------------------------------------------------


def test_modes(adapter: Adapter) -> None:
    c = adapter.c
    assert c.etap_fa3_set_mode(NEVER) == AUTO and c.etap_fa3_mode() == NEVER
    assert adapter.run(Call()) == {"taken": False} and adapter.last_reason() == "switched off"
    assert c.etap_fa3_set_mode(3) == -2 and c.etap_fa3_set_mode(-1) == -2 and c.etap_fa3_mode() == NEVER
    assert c.etap_fa3_set_mode(ALWAYS) == NEVER
    assert adapter.run(Call())["taken"]
    assert adapter.counts() == {"switched off": 1, "taken": 1}
    c.etap_fa3_reset_counts()
    assert adapter.counts() == {}


def test_row_limit(adapter: Adapter) -> None:
    assert adapter.c.etap_fa3_set_max_rows(31) == 64
    assert not adapter.run(Call())["taken"] and adapter.last_reason().startswith("rows")
    assert adapter.c.etap_fa3_set_max_rows(32) == 31 and adapter.run(Call())["taken"]
    assert adapter.c.etap_fa3_set_max_rows(-1) == -1


def test_what_upstream_is_faster_at(adapter: Adapter) -> None:
    """Only by the switch "auto", and only if it is asked to look."""
    rule = "upstream is faster: more than 32 rows"
    many = {"h": 16, "seqlen_q": 3}
    assert adapter.c.etap_fa3_set_only_where_faster(1) == 0
    for changes, taken in ((many, False), ({}, True), ({"seqlen_q": 1}, True), ({"b": 5, **many}, False)):
        assert adapter.run(Call(**changes)).get("taken") == taken, changes
        assert adapter.last_reason() == ("taken" if taken else rule)
    adapter.c.etap_fa3_set_mode(ALWAYS)
    assert adapter.run(Call(**many))["taken"]
    adapter.c.etap_fa3_set_mode(AUTO)
    assert adapter.c.etap_fa3_set_only_where_faster(0) == 1
    assert adapter.run(Call(**many))["taken"]


def test_cuda_error_is_raised(adapter: Adapter) -> None:
    """Falling back would hide it, and upstream would fail alike."""
    assert adapter.run(Call(fail=True)) == {"error": "ETAP: launch: made-up error"}


def test_reasons(adapter: Adapter) -> None:
    reasons = adapter.reasons()
    assert reasons[0] == "taken" and len(set(reasons)) == len(reasons)
    assert adapter.c.etap_fa3_reason(-1) is None and adapter.c.etap_fa3_reason(len(reasons)) is None
    assert adapter.c.etap_fa3_count(-1) == 0 and adapter.c.etap_fa3_count(len(reasons)) == 0


@pytest.mark.parametrize(
    ("value", "mode"), [(None, AUTO), ("", AUTO), ("auto", AUTO), ("always", ALWAYS), ("never", NEVER), ("on", -1)]
)
def test_environment(library: Path, value: str | None, mode: int) -> None:
    """ETAP_FA3 is read once, by the first call; a value that means nothing is an error then."""
    script = (
        "import os, test_fa3_adapter as t, pathlib, sys\n"
        "a = t.Adapter(pathlib.Path(sys.argv[1]))\n"
        "first = a.run(t.Call(seqlen_q=1))\n"
        "os.environ['ETAP_FA3'] = 'never'\n"
        "print(t.json.dumps([a.c.etap_fa3_mode(), first.get('taken'), first.get('error')]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ETAP_FA3"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    if value is not None:
        environment["ETAP_FA3"] = value
    command = [sys.executable, "-c", script, str(library)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [
        mode,
        None if mode == -1 else mode != NEVER,
        "ETAP_FA3=on: expected auto, always or never" if mode == -1 else None,
    ]


# The build ------------------------------------------------------------------------------------------------------------


def test_every_source_has_its_wrapper() -> None:
    """Upstream compiles only csrc/fa3/*_sm90.cu: each shared host file is one of them, and each kernel instance but
    those with scales of groups of columns, which no call of upstream's has."""
    wrappers = {p.name: p.read_text() for p in (CSRC / "fa3").glob("*_sm90.cu")}
    files = [p for p in (CSRC / "instances").glob("*.cu") if "_groups_" not in p.name]
    instances = {f"{p.stem}_sm90.cu": f'"../instances/{p.name}"' for p in files}
    hosts = {f"{name}_sm90.cu": f'"../ops/{name}.cpp"' for name in ("launch", "workspace")}
    assert "#define ETAP_WITHOUT_GROUPS" in wrappers["launch_sm90.cu"]
    assert instances and wrappers.keys() == {"adapter_sm90.cu", *instances, *hosts}
    for name, included in {**instances, **hosts}.items():
        assert f"#include {included}" in wrappers[name]
    # torch's build forbids the conversions that every kernel uses, whatever its cache
    assert all(wrappers[name].startswith('#include "conversions.h"\n') for name in instances)


def test_every_field_is_upstreams(fa3_tree: Path) -> None:
    """The stand-in for upstream's struct has no field that the pinned flash.h lacks."""
    text = (fa3_tree / "hopper/flash.h").read_text().split("struct Flash_bwd_params")[0]
    for name in GIVEN:
        assert f" {name};" in text or f" {name}," in text, name


@pytest.mark.parametrize("source", ["flash_api.cpp", "flash_api_stable.cpp"])
def test_the_check_that_is_put_off_is_made_for_every_call_that_is_not_taken(fa3_tree: Path, source: str) -> None:
    """Between ETAP's answer and anything that upstream launches stands the check, under no condition."""
    text = (fa3_tree / "hopper" / source).read_text()
    forward = text[text.index("\nmha_fwd(") : text.index("\nvoid run_mha_bwd(")]
    before, offered = forward.split("    if (etap::fa3::try_run(")
    lines = offered.split("\n")
    assert lines[2] == "    }" and lines[3].startswith("    check_cache_dtypes();")
    assert "run_mha_fwd(" not in before and "prepare_varlen_num_blocks(" not in before
    lambda_, asked = before.split("    auto const check_cache_dtypes = [&] {\n")[1].split("    };\n", 1)
    assert [line.split("CHECK(")[1][:16] for line in lambda_.splitlines()] == ["k.scalar_type() ", "v.scalar_type() "]
    assert asked.startswith("    if (!etap::fa3::may_widen(q, k, v, q_v_)) { check_cache_dtypes(); }\n")


@pytest.fixture(scope="module")
def fa3_tree(tmp_path_factory) -> Path:
    """The pinned FlashAttention-3, patched."""
    release = load_manifest("flash-attention-3").release()
    archive = fetching.fetch_archive(release.archive)
    tree = fetching.fetch(release, archive=archive, dest=tmp_path_factory.mktemp("fa3") / "tree")
    series.apply(release, tree)
    return tree


def _compile(command: list[str], tree: Path) -> str:
    """Run a compiler in upstream's source folder; its output."""
    run = subprocess.run(command, cwd=tree / "hopper", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout + run.stderr


@pytest.mark.parametrize("source", ["flash_api.cpp", "flash_api_stable.cpp"])
def test_patched_source_compiles(fa3_tree: Path, source: str) -> None:
    """Against torch's and CUDA's real headers; syntax and types only."""
    try:
        plan = etap_build.Plan.make(ROOT)
    except etap_build.Unbuildable as reason:
        pytest.skip(f"not run: {reason}")
    if not plan.torch.has_cuda_headers:
        pytest.skip("not run: torch has no CUDA headers")
    python = Path(sysconfig.get_paths()["include"])
    if not (python / "Python.h").exists():
        pytest.skip("not run: no Python.h")
    ours = [".", "../csrc/cutlass/include", CSRC]
    theirs = [*plan.system_includes(), python]
    command = [*shlex.split(plan.cxx), "-std=c++17", "-fsyntax-only", "-w", "-DPy_LIMITED_API=0x03090000"]
    command += ["-DTORCH_STABLE_ONLY"] if "stable" in source else []
    command += [f"-I{folder}" for folder in ours] + [part for folder in theirs for part in ("-isystem", str(folder))]
    _compile([*command, source], fa3_tree)


# What torch's build and upstream's setup.py pass.
UPSTREAM_NVCC_FLAGS = """
    -O3 -std=c++17 --use_fast_math --resource-usage -lineinfo -DNDEBUG -DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
    -DCUTLASS_ENABLE_GDC_FOR_SM90 -DCUTLASS_DEBUG_TRACE_LEVEL=0 -D__CUDA_NO_HALF_OPERATORS__
    -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_BFLOAT16_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__
    --expt-relaxed-constexpr --compiler-options -fPIC -gencode arch=compute_90a,code=sm_90a
""".split()


KERNELS = ("bf16_rows16", "fp16_rows32", "bf16_rows64", "bf16_e4m3_rows32", "fp16_e4m3_rows8")


@pytest.mark.parametrize("name", ["adapter", "launch", "workspace", *(f"mla_decode_{kernel}" for kernel in KERNELS)])
def test_kernels_compile_in_upstreams_build(fa3_tree: Path, tmp_path: Path, name: str) -> None:
    """With upstream's flags and its CUTLASS: no spills, no serialised wgmma."""
    try:
        nvcc = etap_build.Nvcc.find()
    except etap_build.Unbuildable as reason:
        pytest.skip(f"not run: {reason}")
    folders = [".", "../csrc/cutlass/include", CSRC]
    command = [nvcc.path, *UPSTREAM_NVCC_FLAGS, *(f"-I{folder}" for folder in folders)]
    command += ["-c", str(CSRC / "fa3" / f"{name}_sm90.cu"), "-o", str(tmp_path / "object.o")]
    report = _compile(command, fa3_tree)
    kernels, warnings = etap_build.parse_ptxas(report)
    assert not etap_build.problems(kernels, warnings)
    assert bool(kernels) == name.startswith("mla_decode")
