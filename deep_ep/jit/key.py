"""The name of a build: equal keys mean equal machine code, wherever and by whomever it was built.

No path goes into a key, so a cache outlives a move of the package, of the compiler or of itself.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from deep_ep.jit.toolchain import Toolchain

# Raise it when the meaning of a key or the layout of a cache entry changes.
SCHEMA = "deep_ep.jit.1"
INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', re.MULTILINE)


def make_key(toolchain: Toolchain, sources: Mapping[str, bytes]) -> str:
    """The key of what a toolchain makes of some sources.

    Args:
        toolchain: its name, version, architecture, flags, outputs, linked libraries and headers all count.
        sources: text by file name.

    Returns:
        64 hexadecimal digits.
    """
    return _labelled_digest(_ingredients(toolchain, sources))


def digest_of_headers(folder: Path) -> str:
    """What all headers below a folder say, in 12 hexadecimal digits."""
    headers = sorted((path.relative_to(folder).as_posix(), path.read_bytes()) for path in folder.rglob("*.cuh"))
    return _labelled_digest(headers)[:12]


def _ingredients(toolchain: Toolchain, sources: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    yield "schema", SCHEMA.encode()
    yield "toolchain", toolchain.name.encode()
    yield "version", toolchain.version.encode()
    yield "architecture", toolchain.architecture.encode()
    for flag in toolchain.flags:
        yield "flag", flag.encode()
    for output in toolchain.outputs:
        yield "output", output.encode()
    for library in toolchain.libraries:
        yield f"library {library.name}", hashlib.sha256(library.read_bytes()).digest()
    for name, text in sorted(sources.items()):
        yield f"source {name}", text
    for name, text in reached_headers(sources.values(), toolchain.include_dirs):
        yield f"header {name}", text


def _labelled_digest(ingredients: Iterable[tuple[str, bytes]]) -> str:
    # Each part carries its label and length, so no two different lists run together into the same bytes.
    digest = hashlib.sha256()
    for label, value in ingredients:
        digest.update(f"{label}:{len(value)}:".encode())
        digest.update(value)
    return digest.hexdigest()


def reached_headers(sources: Iterable[bytes], include_dirs: Sequence[Path]) -> list[tuple[str, bytes]]:
    """All headers that sources can reach through includes, under whatever condition.

    Only headers below include_dirs count (ours, and NCCL's for a kernel that includes it); those of a compiler are in
    its version. Files are read anew at every call: it takes a millisecond or two, and a header may have been edited.

    Args:
        sources: texts that include with paths relative to one of include_dirs.
        include_dirs: searched in order, as a compiler does.

    Returns:
        (path relative to the folder of include_dirs that holds it, content), sorted.
    """
    found: dict[Path, bytes] = {}
    waiting: list[tuple[bytes, tuple[Path, ...]]] = [(text, ()) for text in sources]
    while waiting:
        text, beside = waiting.pop()
        for include in INCLUDE.findall(text):
            path = _resolve(include.decode(), (*beside, *include_dirs))
            if path is not None and path not in found:
                found[path] = path.read_bytes()
                waiting.append((found[path], (path.parent,)))
    return sorted((_relative(path, include_dirs), content) for path, content in found.items())


def _resolve(include: str, folders: Iterable[Path]) -> Path | None:
    for folder in folders:
        path = Path(os.path.normpath(folder / include))
        if path.is_file():
            return path
    return None


def _relative(path: Path, include_dirs: Sequence[Path]) -> str:
    for folder in include_dirs:
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.name
