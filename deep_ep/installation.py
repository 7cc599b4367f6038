"""Whether this is the only deep_ep that is installed here: there is another library of the same import name."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from pathlib import Path

from deep_ep.errors import EPEnvironmentError

PACKAGE = Path(__file__).parent
FOREIGN_MODULE = "deep_ep_cpp"  # the extension module of the other library; ours has none at all


@functools.cache
def check() -> None:
    """Look for parts of the other library: mixed with ours they fail in ways that nobody can read.

    Raises:
        EPEnvironmentError: with what was found where, and the lines that mend it.
    """
    found = [f"the module {FOREIGN_MODULE} ({origin})" for origin in _origins(FOREIGN_MODULE)]
    found += [f"the extension {path}" for path in sorted(PACKAGE.rglob("*.so"))]
    for distribution in importlib.metadata.distributions(name="deep_ep"):
        binaries = [file for file in distribution.files or () if file.suffix == ".so"]
        found += [f"version {distribution.version} with {distribution.locate_file(file)}" for file in binaries]
    if found:
        raise EPEnvironmentError(
            f"another library that is imported as deep_ep is installed beside this one (in {PACKAGE}): "
            f"{'; '.join(found)}. Remove it and install this one again: pip uninstall -y deep_ep {FOREIGN_MODULE}; "
            "pip install 'deep_ep[cu13]'"
        )


def _origins(module: str) -> list[str]:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # half of a module is none that anybody could use
        return []
    return [] if spec is None else [str(spec.origin)]
