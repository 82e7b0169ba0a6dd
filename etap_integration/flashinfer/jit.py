"""What the patched module generator of FlashInfer calls: the patched module's name, its sources, and which were loaded.

Imported by FlashInfer's `jit/attention/modules.py` where that is patched, in place or in an overlay.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etap_integration.patching import locations
from etap_integration.patching.errors import UnknownNameError

ROW_TILES, E4M3_ROW_TILES = (8, 16, 32, 64), (8, 16, 32)
HEAD_DIMS = (512, 64)  # latent, rope
MAX_ROWS = 32  # beyond, upstream is faster in some cells
E4M3_MAX_ROWS = 64  # upstream's kernel takes three to five times as long
_MARK = "_etap_"
_DTYPES = {"bf16": "bf16", "f16": "fp16"}  # FlashInfer's name in a module's name -> ours
_E4M3 = "e4m3"

_lock = threading.Lock()
_specs: dict[str, Any] = {}  # module name -> the specification it was built from
_loaded: dict[str, Any] = {}  # module name -> what loading it gave
_on_load: list[Callable[[Any], None]] = []


def sources_id() -> str:
    """Twelve hex digits that change with any of ETAP's device sources or FlashInfer patches.

    Raises:
        TreeNotFoundError: `csrc/` or `patches/` is neither beside the package nor where its variable points.
    """
    csrc, patches = locations.csrc_root(), locations.patches_root() / "flashinfer"
    folders = [csrc / name for name in ("etap", "flashinfer", "instances", "ops")]
    files = [file for folder in folders for file in folder.rglob("*")] + list(patches.glob("*.patch"))
    stamp = tuple(sorted((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file()))
    return _digest(stamp, csrc.parent, patches.parent)


@functools.lru_cache(maxsize=4)
def _digest(stamp: tuple[tuple[str, int, int], ...], *roots: Path) -> str:
    digest = hashlib.sha256()
    for name, _, _ in stamp:
        file = Path(name)
        root = next(root for root in roots if file.is_relative_to(root))
        digest.update(
            f"{file.relative_to(root).as_posix()}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()[:12]


def module_name(uri: str, backend: str) -> str:
    """The patched module's name: upstream's and `sources_id()`; upstream's alone where the backend is not patched."""
    return f"{uri}{_MARK}{sources_id()}" if backend == "fa3" else uri


def is_patched_name(name: str) -> bool:
    """Whether a module of this name holds ETAP's kernels or at least its adapter."""
    return re.search(rf"{_MARK}[0-9a-f]{{12}}\Z", name) is not None


def default_max_rows(name: str) -> int:
    """Most query rows (num_heads x the longest query) of a call that a patched module of this name takes by default."""
    return E4M3_MAX_ROWS if f"_dtype_kv_{_E4M3}_" in name else MAX_ROWS


def module_sources(name: str) -> list[Path]:
    """ETAP's part of a patched module's sources.

    The kernels are those of the query's and the cache's dtype; none where ETAP has none for the module's dtypes or head
    dimensions, so that every call is upstream's.

    Args:
        name: the patched module's name, from which dtypes and head dimensions are read.

    Raises:
        UnknownNameError: the name does not say them.
    """
    found = re.search(r"dtype_q_(\w+?)_dtype_kv_(\w+?)_dtype_o_(\w+?)_dtype_idx_.*ckv_(\d+)_head_dim_kpe_(\d+)_", name)
    if found is None:
        raise UnknownNameError("FlashInfer module", name, ["batch_mla_attention_dtype_q_..._head_dim_kpe_..."])
    query, cache, output = found.groups()[:3]
    kernels = None
    if tuple(map(int, found.groups()[3:])) == HEAD_DIMS and query == output and query in _DTYPES:
        kernels = {query: _DTYPES[query], _E4M3: f"{_DTYPES[query]}_e4m3"}.get(cache)
    csrc = locations.csrc_root()
    sources = [csrc / "flashinfer" / name for name in ("adapter.cu", "launch.cu", "workspace.cu")]
    for family in (*_DTYPES.values(), *(f"{dtype}_e4m3" for dtype in _DTYPES.values())):
        if family == kernels:
            tiles = ROW_TILES if family in _DTYPES.values() else E4M3_ROW_TILES
            sources += [csrc / f"instances/mla_decode_{family}_rows{tile}.cu" for tile in tiles]
        else:
            sources.append(csrc / f"flashinfer/without_{family}.cu")
    return sources


def jit_spec(gen_jit_spec: Callable[..., Any], name: str, sources: Sequence[Any], **options: Any) -> Any:
    """FlashInfer's `gen_jit_spec`, with ETAP's sources where `name` is a patched module's.

    Args:
        gen_jit_spec: FlashInfer's function.
        name: the module's name, see `module_name`.
        sources, options: its other arguments.
    """
    if not is_patched_name(name):
        return gen_jit_spec(name, sources, **options)
    flags = f"-DETAP_MODULE={name}", f"-DETAP_MAX_ROWS={default_max_rows(name)}"  # of csrc/flashinfer/adapter.cu
    options["extra_cuda_cflags"] = [*(options.get("extra_cuda_cflags") or ()), *flags]
    options["extra_include_paths"] = [*(options.get("extra_include_paths") or ()), locations.csrc_root()]
    spec = gen_jit_spec(name, [*sources, *module_sources(name)], **options)
    load = spec.load

    @functools.wraps(load)
    def load_and_note(*args: Any, **kwargs: Any) -> Any:
        module = load(*args, **kwargs)
        with _lock:
            _specs[name], _loaded[name] = spec, module
            listeners = list(_on_load)
        for listener in listeners:
            listener(library_path(spec))
        return module

    spec.load = load_and_note
    return spec


def library_path(spec: Any) -> Path:
    """The shared library that a specification's module was loaded from."""
    return Path(spec.get_library_path()) if hasattr(spec, "get_library_path") else Path(spec.jit_library_path)


def loaded_libraries() -> dict[str, Path]:
    """The patched modules loaded in this process: name -> shared library."""
    with _lock:
        return {name: library_path(spec) for name, spec in _specs.items()}


def is_patched_module(module: Any) -> bool:
    """Whether a wrapper's module is one of those loaded here."""
    with _lock:
        return any(module is loaded for loaded in _loaded.values())


def on_load(listener: Callable[[Path], None]) -> None:
    """Calls `listener` with the library of every patched module loaded from now on."""
    with _lock:
        if listener not in _on_load:
            _on_load.append(listener)
