"""What every command shares: exit codes, `--json`, errors."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, IntEnum
from pathlib import PurePath
from typing import Annotated, Any

import typer
from rich.console import Console

from etap_integration.patching.errors import PatchingError


class Exit(IntEnum):
    """Exit codes of every command; 2 is the parser's, for a command line it does not understand."""

    OK = 0
    NEGATIVE = 1  # the command ran, and the answer is no: a check failed, a tree is not patched, results differ
    USAGE = 2
    MISSING = 3  # something the command needs is not here: a GPU, a library, a checkout, a package


class CommandError(Exception):
    """Ends a command with a message. `code`: its exit code."""

    code = Exit.NEGATIVE


class MissingError(CommandError):
    """Something the command needs is not here; the message says what, and how to get it."""

    code = Exit.MISSING


JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, and nothing else.")]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def plain(value: Any) -> Any:
    """`value` as JSON's own types: dataclasses and mappings as objects, enums by value, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value


def emit(as_json: bool, data: Any, show: Callable[[], None]) -> None:
    """Prints `data` as JSON, or calls `show`, which prints it for people."""
    if as_json:
        print(json.dumps(plain(data), indent=2))
    else:
        show()


def reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose expected errors end it with a message and an exit code, and as {"error": ...} under --json."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (CommandError, PatchingError) as error:
            code = error.code if isinstance(error, CommandError) else Exit.NEGATIVE
            if kwargs.get("as_json"):
                print(json.dumps({"error": str(error), "exit_code": int(code)}, indent=2))
            else:
                err.print(f"error: {error}", markup=False, style="red")
            raise typer.Exit(int(code)) from error

    return run


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 0) -> None:
    """Prints a table that no terminal width cuts; the first `text_columns` columns are flush left, the rest right."""
    if title:
        out.print(title, style="bold", markup=False)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        padded = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if i < text_columns else cell.rjust(width) for i, (cell, width) in padded]
        out.print("  ".join(cells).rstrip(), markup=False, style="dim" if row is header else None)
