"""Builds the two native parts of etap_integration; the metadata is in pyproject.toml.

  etap_integration/_C/_host*.so          host module: work split and kernel configurations, host compiler only
  etap_integration/_C/libetap_mla.so     operator library: nvcc, torch and CUTLASS (see tools/etap_build.py)

The library is left out, with a line saying why, where nvcc, a CUDA build of torch or CUTLASS is missing;
ETAP_BUILD=op turns that into an error and ETAP_BUILD=host never tries.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import etap_build  # noqa: E402  (needs the path above)
from pybind11.setup_helpers import Pybind11Extension  # noqa: E402

LIBRARY = "etap_integration._C.libetap_mla"


class BuildExt(build_ext):
    """build_ext that hands the operator library to etap_build and copies its report along."""

    def run(self) -> None:
        mode = os.environ.get("ETAP_BUILD", "auto")
        if mode not in ("auto", "op", "host"):
            raise SystemExit(f"ETAP_BUILD={mode}: expected auto, op or host")
        self.plan = None
        try:
            if mode == "host":
                raise etap_build.Unbuildable("ETAP_BUILD=host")
            self.plan = etap_build.Plan.make(ROOT)
            self.plan.sources()
        except etap_build.Unbuildable as reason:
            if mode == "op":
                raise SystemExit(f"[etap] cannot build {etap_build.LIBRARY_NAME}: {reason}") from None
            print(f"[etap] only the host module is built, not {etap_build.LIBRARY_NAME}: {reason}", flush=True)
            self.extensions = [e for e in self.extensions if e.name != LIBRARY]
            # an earlier build's must not get into a wheel
            for name in (etap_build.LIBRARY_NAME, etap_build.REPORT_NAME):
                (Path(self.build_lib) / "etap_integration/_C" / name).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext) -> None:
        if ext.name != LIBRARY:
            return super().build_extension(ext)
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        etap_build.build_library(output, ROOT, plan=self.plan)

    def get_ext_filename(self, fullname: str) -> str:
        """The operator library has no Python ABI, so no ABI tag in its name either."""
        if fullname.split(".")[-1] == LIBRARY.split(".")[-1]:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        report = Path(self.build_lib) / "etap_integration/_C" / etap_build.REPORT_NAME
        if self.plan is not None and report.exists():
            self.copy_file(str(report), str(ROOT / "etap_integration/_C" / etap_build.REPORT_NAME))


host = Pybind11Extension(
    "etap_integration._C._host",
    ["csrc/host_module.cpp"],
    include_dirs=["csrc"],
    depends=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.h"))],
    cxx_std=17,
)
library = Pybind11Extension(LIBRARY, [])
setup(ext_modules=[host, library], cmdclass={"build_ext": BuildExt})
