"""`etap run`: starts a program with ETAP enabled in it and in every Python process below it."""

from __future__ import annotations

import os
import shutil
import site
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import etap_integration
from etap_integration import autostart
from etap_integration.cli.output import CommandError, JsonOption, MissingError, emit, out, reported

CONTEXT: dict[str, Any] = {"ignore_unknown_options": False, "allow_interspersed_args": False}
HOOK = Path(etap_integration.__file__).parent / "_hook"


def python_path(inherited: str) -> str:
    """PYTHONPATH for the child: the hook first, then what was there, then this package where it is not installed."""
    parts = [str(HOOK), *(p for p in inherited.split(os.pathsep) if p and p != str(HOOK))]
    home = Path(etap_integration.__file__).resolve().parents[1]
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    if str(home) not in parts and str(home) not in installed:
        parts.append(str(home))
    return os.pathsep.join(parts)


def child_environment(settings: dict[str, str], inherited: dict[str, str]) -> dict[str, str]:
    """The environment of the program: `inherited`, the hook, and `settings`.

    Raises CommandError where the settings mean nothing.
    """
    environment = {**inherited, **settings, "PYTHONPATH": python_path(inherited.get("PYTHONPATH", ""))}
    try:
        autostart.requested(environment)
        autostart.options(environment)
        from etap_integration import shadowing

        shadowing.settings_from(environment)
    except ValueError as error:
        raise CommandError(str(error)) from None
    return environment


@reported
def run(
    command: Annotated[
        list[str], typer.Argument(help="The program and its arguments, after `--`.", metavar="COMMAND...")
    ],
    target: Annotated[
        list[str] | None,
        typer.Option(help=f"Only these: {', '.join(autostart.TARGET_NAMES)}. Repeatable; default all that it imports."),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Leave calls with more query rows to upstream.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Raise instead of leaving an MLA call to upstream.")] = False,
    shadow: Annotated[
        float | None, typer.Option(help="Shadow mode: compare this fraction of calls, 0 to 1; see --serve.")
    ] = None,
    serve: Annotated[
        str | None, typer.Option(help="In shadow mode, whose result the program gets: upstream (default) or etap.")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="In shadow mode, append the calls' shapes to this file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be started, and start nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start any Python program with ETAP enabled in it and its child processes.

    The target is patched the moment a process imports it; processes that never do are left alone. Nothing is installed
    or changed on disk. Python's options -I, -E and -S switch it off, since they ignore PYTHONPATH or sitecustomize.
    `etap run -- python -m sglang.launch_server ...`, `etap run -- vllm serve ...`. --json goes with --dry-run.
    """
    settings = {"ETAP_ENABLE": ",".join(target) if target else "1"}
    if max_rows is not None:
        settings["ETAP_MAX_ROWS"] = str(max_rows)
    if strict:
        settings["ETAP_STRICT"] = "1"
    if shadow is not None:
        settings["ETAP_SHADOW"] = str(shadow)
    elif serve is not None or record is not None:
        raise CommandError("--serve and --record belong to shadow mode: pass --shadow FRACTION")
    if serve is not None:
        settings["ETAP_SHADOW_SERVE"] = serve
    if record is not None:
        settings["ETAP_SHADOW_RECORD"] = str(record.absolute())
    environment = child_environment(settings, dict(os.environ))
    if command[0].endswith(".py") and shutil.which(command[0]) is None:
        command = [sys.executable, *command]
    program = shutil.which(command[0])
    if program is None:
        raise MissingError(f"command: {command[0]!r} is no program on PATH")
    if dry_run or as_json:
        changed = {k: v for k, v in environment.items() if os.environ.get(k) != v}

        def show() -> None:
            for name, value in changed.items():
                out.print(f"{name}={value}", markup=False)
            out.print(" ".join(command), markup=False)

        emit(as_json, {"command": command, "environment": changed}, show)
        return
    sys.stdout.flush()
    os.execvpe(program, command, environment)
