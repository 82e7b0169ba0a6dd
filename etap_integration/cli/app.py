"""The `etap` command: its subcommands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from etap_integration import __version__
from etap_integration.cli import benching, comparing, doctor, launch, modelling, overview
from etap_integration.flashinfer.__main__ import app as flashinfer
from etap_integration.patching import cli as patches

HELP = """ETAP: transposed-pipeline MLA decode attention for Hopper GPUs, for FlashAttention-3 and FlashInfer.

Exit codes: 0 fine; 1 the answer is no (a check failed, results differ); 2 the command line is wrong; 3 something the
command needs is not here. Every command takes --json.
"""

app = typer.Typer(
    no_args_is_help=True,
    help=HELP,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"etap {__version__}")
        raise typer.Exit()


@app.callback()
def _etap(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


HERE, PATCH, MEASURE = "This machine", "Patch an upstream library", "Measure and predict"

app.command(rich_help_panel=HERE)(overview.overview)
app.command(rich_help_panel=HERE)(doctor.doctor)
app.command(rich_help_panel=HERE, context_settings=launch.CONTEXT)(launch.run)
app.command(rich_help_panel=MEASURE)(comparing.ab)
app.command(rich_help_panel=MEASURE)(benching.bench)
app.command(rich_help_panel=MEASURE)(modelling.model)
app.command(rich_help_panel=MEASURE)(benching.report)
for registered in patches.app.registered_commands:
    assert registered.callback is not None
    app.command(registered.name, hidden=registered.hidden, rich_help_panel=PATCH)(registered.callback)
app.add_typer(flashinfer, name="flashinfer", rich_help_panel=PATCH)
