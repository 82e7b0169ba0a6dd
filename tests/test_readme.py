"""README and docs: every command is run here as written, or by the CI script; every link and path leads somewhere.

A command without an entry in `EXPECTED` or `ELSEWHERE` fails. Those that need a GPU are run up to saying so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dispatch_fixtures import FA3, SGL, clean_modules, engine

from tools.bench import records

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
             ROOT / "tools/bench/README.md"]  # fmt: skip
CI = (ROOT / ".ci/run").read_text()
GPU = torch.cuda.is_available()
RECORDED = sorted(path.stem for path in records.RESULTS.glob("*.jsonl") if records.read(path))  # stale ones, too
CUDA_BUILD = torch.version.cuda is not None and shutil.which("nvcc") is not None


def commands(text: str) -> list[str]:
    """The lines of shell blocks, and indented lines that begin like one, without their comments."""
    found = [line for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S) for line in block.splitlines()]
    found += re.findall(r"^ {4}((?:pip|python|etap|make) .*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return [line.split(" #")[0].strip() for line in found if line.strip() and not line.startswith("#")]


@dataclass(frozen=True)
class Expected:
    """What a command does here: its exit code, and what it prints."""

    code: int = 0
    says: str = ""
    gpu: bool = False  # on a machine with a GPU it would do its real work: not run there, but by the GPU suite


E = Expected
NO_GPU = E(3, "GPU", gpu=True)
PATCHING = "python -m etap_integration.patching"
EXPECTED: dict[str, Expected] = {
    "python -m etap_integration.numerics": E(says="ETAP, P in two 16-bit parts"),
    "python tools/etap_build.py --show": E(0 if CUDA_BUILD else 2, "cannot build" if not CUDA_BUILD else "sources"),
    "make help": E(says="gpu-test"),
    # patch and rebuild
    "etap fetch flash-attention-3 && etap apply flash-attention-3": E(says="patched hopper/"),
    "etap verify flash-attention-3": E(says="patched"),
    "etap build flash-attention-3 --kernels mla-decode": E(1, "cannot build"),
    f"{PATCHING} fetch  flash-attention-3": E(says="flash-attention"),
    f"{PATCHING} check  flash-attention-3": E(says="pristine"),
    f"{PATCHING} apply  flash-attention-3": E(says="patched hopper/"),
    f"{PATCHING} verify flash-attention-3": E(says="patched"),
    f"{PATCHING} build  flash-attention-3 --kernels mla-decode --jobs 8": E(1, "cannot build"),
    f"{PATCHING} revert flash-attention-3": E(says="restored hopper/"),
    # running programs, which are stand-ins here
    "etap run -- python -m sglang.launch_server --attention-backend fa3": E(says="True ['--attention-backend', 'fa3']"),
    "etap run --shadow 0.01 -- python serve.py": E(says="True []"),
    "etap run --shadow 0.01 --record calls.jsonl -- python serve.py": E(says="True []"),
    "etap run --target vllm.vllm_flash_attn --max-rows 16 -- python serve.py": E(says="False []"),
    "etap run --dry-run -- python serve.py": E(says="ETAP_ENABLE=1"),
    "VLLM_PLUGINS=etap python serve.py": E(says="False []"),
    # doctor finds the stand-in for SGLang's kernels
    "etap doctor": E(says="sgl_kernel.flash_attn"),
    # measuring
    "etap model --gpu h20 --gpu h200 --batch 16 --kv-len 65536": E(says="H20: predicted"),
    "etap model": E(says="H200: predicted"),
    "etap model --gpu this --heads 32 --q-len 2": NO_GPU,
    "etap model --plot roofline.svg": E(says="H200: predicted"),
    "etap ab --grid small": NO_GPU,
    "etap ab --grid decode": NO_GPU,
    "etap ab --grid decode --cache cold --cache warm": NO_GPU,
    "etap ab --how patched --target flash_attn_interface": NO_GPU,
    "etap ab --workload calls.jsonl --json": NO_GPU,
    "etap bench": E(3, "GPU", gpu=True),
    "etap bench --emulate h20": E(3, "GPU", gpu=True),
    "etap report": E(says="README.md"),
    "etap report --check": E(says="up to date"),
    "python tools/bench/dispatch_overhead.py": E(says="FA3, no MLA call"),
    "python -m tools.bench run --grid bars": E(2, "GPU", gpu=True),
    "python -m tools.bench gpu-all --budget-s 600": E(2, "Hopper GPU", gpu=True),
    "python -m tools.bench report": E(says=f"## {RECORDED[-1]}") if RECORDED else E(1, "no rows to report"),
    "python -m pytest -q tests/test_costmodel.py": E(says="passed"),
    "make host": E(says="_host"),
    "make lint": E(),
}  # fmt: skip
ELSEWHERE = {
    'pip install torch && pip install --no-deps nvidia-cutlass==4.2.0.0 && pip install -e ".[test]" '
    "&& python -m etap_integration": "the CI script, and the main command by tests/test_cli.py",
    "python -m pytest": "the CI script",
    "pip install --no-deps WHEEL": "a placeholder",
    "python -m tools.bench build-rivals": "12 minutes of nvcc; its steps by tests/test_bench_rivals.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the documents' commands mean what they say: `etap`, `python`, `make` of this
    interpreter, a cache of its own that shares the downloads, and stand-ins for SGLang and a user's program."""
    folder = tmp_path_factory.mktemp("shop")
    programs, work, cache = folder / "bin", folder / "work", folder / "cache"
    for place in (programs, work, cache):
        place.mkdir()
    for name, line in (("etap", f"{sys.executable} -m etap_integration"), ("python", sys.executable)):
        (programs / name).write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        (programs / name).chmod(0o755)
    from etap_integration.patching import locations

    downloads = locations.cache_root() / "archives"
    downloads.mkdir(parents=True, exist_ok=True)
    (cache / "archives").symlink_to(downloads)
    from dispatch_fixtures import SIGNATURES

    (work / "sgl_kernel").mkdir()
    (work / "sgl_kernel/__init__.py").touch()
    functions = [f"def {f}({s}): ...\n" for (module, f), s in SIGNATURES.items() if module == SGL]
    (work / "sgl_kernel/flash_attn.py").write_text("".join(functions))
    program = (
        "import sys\nfrom sgl_kernel.flash_attn import flash_attn_with_kvcache as f\n"
        "print(hasattr(f, '__etap_route__'), sys.argv[1:])\n"
    )
    (work / "serve.py").write_text(program)
    (work / "sglang").mkdir()
    (work / "sglang/__init__.py").touch()
    (work / "sglang/launch_server.py").write_text(program)
    record = {"kv_lens": [7], "heads": 16, "q_len": 1, "q_tokens": 1, "ragged": False, "page_size": 1,
              "dtype": "bfloat16", "causal": True, "softmax_scale": 0.1, "return_lse": True, "fused": True}  # fmt: skip
    import json

    (work / "calls.jsonl").write_text(json.dumps(record) + "\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ETAP_")}
    return kept | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{work}{os.pathsep}{ROOT}",
        "ETAP_CACHE_DIR": str(cache),
        "ETAP_BENCH_DIR": str(cache / "bench"),
        "SHOP": str(work),
    }


ALL = [(path.name if path.parent != ROOT / "tools/bench" else "bench", command)
       for path in DOCUMENTS for command in commands(path.read_text())]  # fmt: skip


def test_the_documents_have_commands() -> None:
    assert len(ALL) > 30


@pytest.mark.parametrize(("document", "command"), ALL, ids=[f"{d}: {c}" for d, c in ALL])
def test_command(document: str, command: str, shop: dict[str, str], tmp_path: Path) -> None:
    """In order: the patch commands of one document follow each other on one tree."""
    if command in ELSEWHERE:
        return
    assert command in EXPECTED, f"{document}: nothing runs {command!r}: give it an entry"
    expected = EXPECTED[command]
    if expected.gpu and GPU:
        pytest.skip("not run: it would do its real work on this machine's GPU")
    if "build" in command and CUDA_BUILD:
        pytest.skip("not run: it would compile FlashAttention-3 here")
    # what reads or writes files of the project's runs in the checkout, the rest beside the stand-ins
    in_checkout = ("make", "tools", "pytest", "report")
    cwd = ROOT if any(word in command for word in in_checkout) else Path(shop["SHOP"])
    if command == "make host":
        command += " --dry-run"  # it would replace the module that these tests have loaded
        expected = Expected(says="build_ext")
    if command == "etap report":  # it would rewrite the checkout's README
        copy = tmp_path / "README.md"
        copy.write_text((ROOT / "README.md").read_text())
        command += f" --no-plots --readme {copy}"
    environment = {**shop, "ETAP_CACHE_DIR": shop["ETAP_CACHE_DIR"] if document != "README.md" else shop["SHOP"] + "/c"}
    if document == "README.md":
        (Path(shop["SHOP"]) / "c").mkdir(exist_ok=True)
        link = Path(shop["SHOP"]) / "c/archives"
        if not link.exists():
            link.symlink_to(Path(shop["ETAP_CACHE_DIR"]) / "archives")
    if "bench" in command and "etap" in command.split()[0]:
        environment["PATH"] = _without_nvcc(shop["PATH"])
        environment["CUDA_HOME"] = environment["CUDACXX"] = str(tmp_path)
    done = subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected.code, done.stdout + done.stderr
    assert expected.says in done.stdout + done.stderr


def _without_nvcc(path: str) -> str:
    """PATH without the folders that hold compilers for the GPU: `etap bench` would use them for half an hour."""
    return os.pathsep.join(p for p in path.split(os.pathsep) if not (Path(p) / "nvcc").exists())


def test_entries_are_of_commands_that_exist() -> None:
    there = {command for _, command in ALL}
    assert set(EXPECTED) | set(ELSEWHERE) <= there, (set(EXPECTED) | set(ELSEWHERE)) - there


def test_ci_runs_what_is_left_to_it() -> None:
    assert "python -m pytest" in CI and 'pip install -q -e ".[test]"' in CI
    assert "nvidia-cutlass==4.2.0.0" in CI and "pip install -q torch" in CI


def test_links_and_paths_exist() -> None:
    missing = []
    for document in DOCUMENTS:
        text = document.read_text()
        links = [link for link in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", text) if link]
        missing += [(document.name, p) for p in links if not (document.parent / p).exists()]
        paths = re.findall(r"`((?:csrc|etap_integration|tests|tools|patches|docs|\.ci)/[\w./-]*)`", text)
        built = ("etap_integration/_C/", "tools/bench/results")
        missing += [(document.name, p) for p in paths if not p.startswith(built) and not (ROOT / p).exists()]
    assert not missing, missing


def test_anchors_exist() -> None:
    for document in DOCUMENTS:
        for file, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", document.read_text()):
            target = (document.parent / file).read_text() if file else document.read_text()
            headings = [re.sub(r"[^\w -]", "", h).strip().lower() for h in re.findall(r"^#+ (.*)", target, re.M)]
            assert anchor in [h.replace(" ", "-") for h in headings], (document.name, anchor)


def blocks(name: str) -> list[str]:
    path = ROOT / name
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


def test_the_operators_example() -> None:
    """On meta tensors where there is no GPU: every argument is checked, shapes are inferred, nothing is launched."""
    (code,) = blocks("README.md")
    scope: dict[str, Any] = {}
    exec(code if GPU else code.replace('"cuda"', '"meta"'), scope)
    assert scope["out"].shape == (16, 1, 16, 512) and scope["lse"].shape == (16, 16, 1)


@pytest.mark.parametrize("name", ["docs/monkeypatch.md", "docs/measuring.md"])
def test_python_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import etap_integration

    monkeypatch.chdir(tmp_path)
    with clean_modules():
        for target in (FA3, SGL):
            engine(target)
        for code in blocks(name):
            exec(code, {})
        etap_integration.disable()
    assert blocks(name)


def test_every_public_function_has_a_docstring() -> None:
    import ast

    lacking = []
    for path in sorted((ROOT / "etap_integration").rglob("*.py")):
        tree = ast.parse(path.read_text())
        classes = [c for c in tree.body if isinstance(c, ast.ClassDef) and not c.name.startswith("_") and not c.bases]
        nodes = [tree, *tree.body, *(m for c in classes for m in c.body)]
        for node in nodes:
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
                name = getattr(node, "name", path.stem)
                if not name.startswith("_") and ast.get_docstring(node) is None:
                    lacking.append(f"{path.relative_to(ROOT)}: {name}")
    assert not lacking, "\n".join(lacking)


def test_issue_templates_ask_for_the_doctor() -> None:
    templates = [p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml"]
    assert templates and all("etap doctor" in p.read_text() for p in templates)


def test_every_variable_is_documented() -> None:
    from etap_integration.cli.doctor import VARIABLES

    text = "".join(path.read_text() for path in DOCUMENTS)
    assert not {name for name in VARIABLES if name not in text}
