"""`python -m etap_integration.flashinfer`: overlay, compile, patch in place, undo. A thin layer over the functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from etap_integration.flashinfer import activation, overlay
from etap_integration.patching.errors import PatchingError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="FlashInfer's MLA wrapper with ETAP's kernels.")
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def _reported(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except PatchingError as error:
            _err.print(f"error: {error}", markup=False, style="red")
            raise typer.Exit(1) from error

    return run


@app.command("check")
@_reported
def check_command() -> None:
    """Say which release is installed, and whether it is patched in place."""
    root = overlay.installed_root()
    release = overlay.supported_release(root)
    how = "patched in place" if overlay.is_patched_in_place(root) else "not patched"
    _out.print(f"{root}: flashinfer {overlay.installed_version(root)}, files of {release.id}, {how}", markup=False)


@app.command("overlay")
@_reported
def overlay_command() -> None:
    """Make the overlay in the cache; the package is not changed."""
    root = overlay.installed_root()
    _out.print(str(overlay.make_overlay(overlay.supported_release(root), root)), markup=False)


@app.command("compile")
@_reported
def compile_command(
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or float16. Repeatable; default bfloat16.")] = None,
) -> None:
    """Compile patched modules now (minutes), or the first plan of each dtype will. Needs nvcc, and no GPU."""
    for name in dtype or ["bfloat16"]:
        _out.print(str(activation.compile_module(name)), markup=False)


@app.command("patch")
@_reported
def patch_command() -> None:
    """Patch the installed package itself, so that every process gets the patched module."""
    root, outcome = activation.patch_in_place()
    for path in outcome.changed:
        _out.print(f"patched {root / path}", markup=False)
    if not outcome.changed:
        _out.print(f"{root}: already patched", markup=False)


@app.command("revert")
@_reported
def revert_command() -> None:
    """Restore the installed package byte for byte."""
    root, outcome = activation.revert_in_place()
    for path in outcome.changed:
        _out.print(f"restored {root / path}", markup=False)
    if not outcome.changed:
        _out.print(f"{root}: nothing to restore", markup=False)


@app.command("clean")
@_reported
def clean_command() -> None:
    """Delete the overlays. Compiled modules stay in FlashInfer's cache."""
    for path in overlay.remove_overlays():
        _out.print(f"deleted {path}", markup=False)


if __name__ == "__main__":
    app(prog_name="python -m etap_integration.flashinfer")
