"""The README: its commands exist and its links lead somewhere, and CI runs the test command it names."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


def scripts() -> list[tuple[str, str]]:
    """(kind, name) of every module or script the commands run."""
    found = []
    for command in COMMANDS:
        words = [w for w in shlex.split(command) if not re.match(r"^[A-Z_]+=", w)]
        if words[0].startswith("python"):
            found.append(("module", words[2]) if words[1] == "-m" else ("file", words[1]))
        elif words[0] == "make":
            found += [("target", w) for w in words[1:]]
    return found


@pytest.mark.parametrize(("kind", "name"), sorted(set(scripts())))
def test_commands_run_something_that_exists(kind: str, name: str) -> None:
    if kind == "module":
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    elif kind == "target":
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.M), name
    else:
        assert (ROOT / name).is_file(), name


def test_numerics_command_prints_every_model() -> None:
    assert "python -m etap_integration.numerics" in COMMANDS
    command = [sys.executable, "-m", "etap_integration.numerics"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ETAP, P in two 16-bit parts") >= 4


def test_links_and_paths_exist() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    paths = re.findall(r"`((?:csrc|etap_integration|tests|tools|patches|docs|\.ci)/[\w./-]*)`", README)
    built = ("etap_integration/_C/",)
    missing = [p for p in (*links, *paths) if not p.startswith(built) and not (ROOT / p).exists()]
    assert not missing, missing


def test_ci_runs_the_documented_test_command() -> None:
    assert "python -m pytest" in COMMANDS
    assert "python -m pytest" in (ROOT / ".ci/run").read_text()
