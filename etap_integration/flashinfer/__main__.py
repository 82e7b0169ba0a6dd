"""`etap flashinfer`, or `python -m etap_integration.flashinfer`: overlay, compile, patch in place, undo.

A thin layer over the functions.
"""

from __future__ import annotations

from typing import Annotated

import typer

from etap_integration.cli.output import JsonOption, emit, out, plain, reported
from etap_integration.flashinfer import activation, overlay

app = typer.Typer(no_args_is_help=True, add_completion=False, help="FlashInfer's MLA wrapper with ETAP's kernels.")


def _lines(as_json: bool, data: object, lines: list[str]) -> None:
    def show() -> None:
        for line in lines:
            out.print(line, markup=False)

    emit(as_json, data, show)


@app.command("check")
@reported
def check_command(as_json: JsonOption = False) -> None:
    """Say which release is installed, and whether it is patched in place."""
    root = overlay.installed_root()
    release = overlay.supported_release(root)
    patched, version = overlay.is_patched_in_place(root), overlay.installed_version(root)
    how = "patched in place" if patched else "not patched"
    data = {"root": root, "version": version, "release": release.id, "patched_in_place": patched}
    _lines(as_json, data, [f"{root}: flashinfer {version}, files of {release.id}, {how}"])


@app.command("overlay")
@reported
def overlay_command(as_json: JsonOption = False) -> None:
    """Make the overlay in the cache; the package is not changed."""
    root = overlay.installed_root()
    made = overlay.make_overlay(overlay.supported_release(root), root)
    _lines(as_json, {"root": root, "overlay": made}, [str(made)])


@app.command("compile")
@reported
def compile_command(
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or float16. Repeatable; default bfloat16.")] = None,
    cache: Annotated[str, typer.Option(help="The cache's dtype: same, as the queries', or e4m3.")] = "same",
    as_json: JsonOption = False,
) -> None:
    """Compile patched modules now (minutes), or the first plan of each dtype will. Needs nvcc, and no GPU."""
    built = {name: activation.compile_module(name, cache) for name in dtype or ["bfloat16"]}
    _lines(as_json, built, [str(path) for path in built.values()])


@app.command("patch")
@reported
def patch_command(as_json: JsonOption = False) -> None:
    """Patch the installed package itself, so that every process gets the patched module."""
    root, outcome = activation.patch_in_place()
    lines = [f"patched {root / path}" for path in outcome.changed] or [f"{root}: already patched"]
    _lines(as_json, {"root": root, **plain(outcome)}, lines)


@app.command("revert")
@reported
def revert_command(as_json: JsonOption = False) -> None:
    """Restore the installed package byte for byte."""
    root, outcome = activation.revert_in_place()
    lines = [f"restored {root / path}" for path in outcome.changed] or [f"{root}: nothing to restore"]
    _lines(as_json, {"root": root, **plain(outcome)}, lines)


@app.command("clean")
@reported
def clean_command(as_json: JsonOption = False) -> None:
    """Delete the overlays. Compiled modules stay in FlashInfer's cache."""
    deleted = list(overlay.remove_overlays())
    _lines(as_json, {"deleted": deleted}, [f"deleted {path}" for path in deleted])


if __name__ == "__main__":
    app(prog_name="python -m etap_integration.flashinfer")
