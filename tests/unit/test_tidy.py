"""The rules of the house that a machine can check: who may use whom, where things stand, how long they may be.

docs/contributing.md says what the rules are for.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "deep_ep"
INCLUDE = PACKAGE / "include" / "deep_ep"

# Part of the package -> the parts that it may import, beside itself. A part is a top-level module or folder.
PURE = frozenset({"errors", "layout", "plan", "sm_model", "topology", "waiting"})
MAY_IMPORT = {
    **dict.fromkeys(PURE, PURE),
    "environment": {"errors"},
    "installation": {"errors"},
    "event": set(),
    "handle": {"event"},
    "validate": PURE | {"environment", "event", "handle"},
    "jit": {"errors", "environment"},
    "machine": {"errors", "environment", "jit", "waiting"},
    "ops": PURE | {"jit"},
    "calls": PURE | {"ops", "machine", "jit", "handle", "event", "validate", "environment", "installation", "version"},
    "later": set(),
    "domains": {"machine"},
    "buffer": PURE | {"calls", "domains", "handle", "event", "validate", "later"},
    "fp8": set(),
    "autograd": {"buffer", "handle", "plan", "validate"},
    "utils": {"event", "fp8"},
    "version": set(),
    "ahead": {"environment", "errors", "jit", "ops"},
    "__init__": {"ahead", "buffer", "domains", "handle", "event", "validate", "errors", "version"},
}

# Folder of headers -> what its headers may include, as prefixes of a path below include/deep_ep.
MAY_INCLUDE = {
    "wire": ("wire/", "device/device.cuh", "limits.cuh"),
    "phases": ("phases/", "wire/", "device/device.cuh", "limits.cuh"),
    "kernels": ("kernels/", "phases/", "wire/", "device/device.cuh", "limits.cuh"),
}
ONLY_IN_DEVICE = re.compile(r"\b(asm|threadIdx|blockIdx|blockDim|gridDim|__shfl\w*|nccl\w*|clock64|printf)\b")
PHASE_OPENING = ("reads", "writes", "waits for", "leaves behind")
NOUNS_AMONG_PHASES = {"results.cuh", "sum.cuh", "tables.cuh"}  # what phases share; no phase itself

MAX_LINES = 450
MAX_KERNEL_LINES = 170
MAX_FUNCTION_LINES = 80
MAX_COLUMNS = 120
TEXT_SUFFIXES = {".py", ".cuh", ".hpp", ".cpp", ".cu", ".md", ".sh", ".toml", ".yaml", ".txt", ""}
# Places that exist on somebody's machine only. The pattern is written so that it does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.$}~>-])/(?:work|tmp|root|home|mnt)/\w")


def project_files(*suffixes: str) -> list[Path]:
    """Every file that the project holds, not what tools leave beside it."""
    folders = (".ci", "deep_ep", "docs", "examples", "tests", "benchmarks", "scripts")
    found = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a file in a linked worktree
    found += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in found if path.suffix in suffixes and "__pycache__" not in path.parts)


def headers(folder: str) -> list[Path]:
    return sorted((INCLUDE / folder).rglob("*.cuh"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_comments(source: str) -> str:
    """C++ without comments and the text of strings; lines stay where they were."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
    return pattern.sub(lambda match: "\n" * match[0].count("\n"), source)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module name) of every import, those inside functions included."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # "from deep_ep import jit" names a part of the package, not a thing in it.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "deep_ep" else [module]
            yield from ((node.lineno, name) for name in names)


def part_of(path: Path) -> str:
    return Path(path.relative_to(PACKAGE).parts[0]).stem


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_python_imports(path: Path) -> None:
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT and docs/contributing.md what it may import"
    for line, module in imports_of(path):
        top, _, rest = module.partition(".")
        where = f"{name_of(path)}:{line}"
        if top == "deep_ep":
            used = rest.partition(".")[0]
            known = used in MAY_IMPORT
            assert not known or used == part or used in MAY_IMPORT[part], f"{where}: {part} may not import {used}"
        elif part in PURE:
            assert top in sys.stdlib_module_names, f"{where}: {part} is pure, and {top} is not in the standard library"


def test_no_import_is_allowed_that_nobody_makes() -> None:
    """But among pure modules, which may all import each other."""
    made = {
        (part_of(path), module.split(".")[1])
        for path in PACKAGE.rglob("*.py")
        for _, module in imports_of(path)
        if module.startswith("deep_ep.")
    }
    allowed = {(part, used) for part, all_used in MAY_IMPORT.items() for used in all_used - PURE}
    assert allowed - made == set()


@pytest.mark.parametrize("path", [path for folder in MAY_INCLUDE for path in headers(folder)], ids=name_of)
def test_header_includes(path: Path) -> None:
    folder = path.relative_to(INCLUDE).parts[0]
    for included in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        inside, _, rest = included.partition("deep_ep/")
        standard = "/" not in included and not included.endswith(".h")
        allowed = standard or (not inside and rest.startswith(MAY_INCLUDE[folder]))
        assert allowed, f"{name_of(path)} includes {included}; headers in {folder}/ may include {MAY_INCLUDE[folder]}"


@pytest.mark.parametrize("path", headers("device"), ids=name_of)
def test_only_gin_includes_nccl(path: Path) -> None:
    if path != INCLUDE / "device" / "sm90" / "gin.cuh":
        assert not re.search(r'#\s*include\s*[<"]nccl', path.read_text())


@pytest.mark.parametrize(
    "path", [path for path in sorted(INCLUDE.rglob("*.cuh")) if "device" not in path.parts], ids=name_of
)
def test_machine_words_stand_in_device_alone(path: Path) -> None:
    for number, line in enumerate(without_comments(path.read_text()).splitlines(), start=1):
        found = ONLY_IN_DEVICE.search(line)
        assert not found, f"{name_of(path)}:{number} says {found and found[0]}, which belongs in device/"


@pytest.mark.parametrize(
    "path", [path for path in headers("phases") if path.name not in NOUNS_AMONG_PHASES], ids=name_of
)
def test_phase_opens_with_its_contract(path: Path) -> None:
    """The comment at the top says what the phase reads, writes, waits for and leaves behind, in this order."""
    opening = re.match(r"(?:(?:#pragma once|//[^\n]*)?\n)*", path.read_text())
    said = re.findall(r"^// (reads|writes|waits for|leaves behind)\b", opening[0] if opening else "", re.MULTILINE)
    assert tuple(said) == PHASE_OPENING, f"{name_of(path)} opens with {said}, not with {PHASE_OPENING}"


@pytest.mark.parametrize(
    "path", [path for folder in ("phases", "kernels", "wire", "device") for path in headers(folder)], ids=name_of
)
def test_templates_are_small(path: Path) -> None:
    """At most two values as template parameters, no defaults; types that a call deduces (callables) do not count."""
    for parameters in re.findall(r"\btemplate\s*<([^>]*)>", without_comments(path.read_text())):
        values = [text for text in parameters.split(",") if not re.match(r"\s*(class|typename)\b", text)]
        assert len(values) <= 2, f"{name_of(path)}: template <{parameters}> has {len(values)} values"
        assert "=" not in parameters, f"{name_of(path)}: template <{parameters}> has a default"


@pytest.mark.parametrize("path", project_files(".py", ".cuh", ".hpp", ".cpp", ".cu"), ids=name_of)
def test_file_is_one_room(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    limit = MAX_KERNEL_LINES if path.is_relative_to(INCLUDE / "kernels") else MAX_LINES
    assert num_lines <= limit, f"{name_of(path)} has {num_lines} lines, over {limit}: is it one room, or several?"


@pytest.mark.parametrize("path", project_files(".cuh", ".hpp", ".cpp"), ids=name_of)
def test_lines_are_short(path: Path) -> None:
    """Comments, too, which clang-format lets stand as they are; ruff looks at Python."""
    long = [i for i, line in enumerate(path.read_text().splitlines(), start=1) if len(line) > MAX_COLUMNS]
    assert not long, f"{name_of(path)}: lines {long} are longer than {MAX_COLUMNS} columns"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_functions_are_short(path: Path) -> None:
    """Docstrings do not count: a long contract is welcome, a long body is not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0].lineno
            num_lines = (node.end_lineno or start) - start + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{name_of(path)}:{node.lineno} {node.name} has {num_lines} lines"


def test_no_paths_of_machines() -> None:
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in project_files(*TEXT_SUFFIXES)
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "\n".join(found)


FRESH_IMPORT = """
import os, sys, torch

forbidden = ("ctypes.dlopen", "subprocess.Popen", "os.system", "os.putenv", "os.unsetenv", "socket.connect")
events = []
sys.addaudithook(lambda event, args: events.append((event, args)) if event in forbidden else None)
before, torchs_own = dict(os.environ), set(sys.modules)

import deep_ep
import deep_ep.utils

new = set(sys.modules) - torchs_own
loaded = sorted(name for name in new if name.partition(".")[0] in ("cuda", "nccl", "nvidia", "cupy"))
assert not loaded, f"importing deep_ep loaded {loaded}"
assert not events, f"importing deep_ep did {events}"
assert dict(os.environ) == before, "importing deep_ep changed the environment"
assert not torch.cuda.is_initialized(), "importing deep_ep initialised CUDA"
"""


def test_import_touches_nothing() -> None:
    """In a fresh interpreter: no CUDA module or call, no process, no library, no change of the environment."""
    done = subprocess.run([sys.executable, "-c", FRESH_IMPORT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_rules_catch_what_they_forbid() -> None:
    """The patterns above find planted mistakes; a rule that never fires would pass in silence."""
    for place in ("home", "work", "root"):
        assert MACHINE_PATH.search(f"include /{place}/someone/nccl")
        assert not MACHINE_PATH.search(f"$HOME/{place}/thing and https://host/{place}/thing")
    assert ONLY_IN_DEVICE.search(without_comments("int lane = threadIdx.x;  // not threadIdx"))
    assert not ONLY_IN_DEVICE.search(without_comments('// printf\n/* asm */ call("ncclGin");'))
    assert [line.strip() for line in without_comments("a /* b\nc */ d").split("\n")] == ["a", "d"]
