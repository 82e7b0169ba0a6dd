"""The touched files of each pinned FlashInfer release, and a stand-in for an installed package that holds them."""

from __future__ import annotations

import zipfile
from pathlib import Path

from etap_integration.patching import fetching
from etap_integration.patching.manifest import Release, load_manifest

MANIFEST = load_manifest("flashinfer")
BESIDE = "data/csrc/batch_mla_config.jinja"  # read by the generator, not touched


def touched_files(release: Release) -> dict[str, bytes]:
    """Path -> content, out of the checked archive, which is downloaded once into the user's cache."""
    archive = fetching.fetch_archive(release.archive)
    with zipfile.ZipFile(archive) as reader:
        return {path: reader.read(f"{release.root}/{path}") for path in (*(f.path for f in release.files), BESIDE)}


def make_package(release: Release, site: Path) -> Path:
    """A package `flashinfer` in `site` with the touched files of a release; importing it runs nothing of upstream's."""
    root = site / "flashinfer"
    for path, content in touched_files(release).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "__init__.py").touch()
    (root / "_build_meta.py").write_text(f'"""Build metadata."""\n__version__ = "{release.id}"\n')
    return root
