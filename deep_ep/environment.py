"""Every EP_* variable, read and checked in this one place.

A field's name in upper case behind ``EP_`` is its variable: ``jit_cache_dir`` is ``EP_JIT_CACHE_DIR``. An empty value
counts as unset. docs/environment.md says what each one does.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from deep_ep.errors import EPEnvironmentError

PREFIX = "EP_"
# Every name with this prefix is ours, so an unknown one is a mistake. EP_ alone is everybody's ("expert parallel":
# launch scripts export EP_SIZE and the like), so there only a name that is nearly one of ours is taken for a mistake.
OWN_PREFIX = "EP_JIT_"
NEARLY = 0.85  # difflib's ratio: EP_BUFFER_DEBGU and EP_NICNAME are near, EP_BUFFER_SIZE is not


@dataclass(frozen=True)
class _Format:
    """What a variable's text must look like: a phrase for the error, and a parser that raises ValueError."""

    expected: str
    parse: Callable[[str], Any]


def _one_of(*allowed: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value not in allowed:
            raise ValueError(text)
        return value

    return parse


def _between(low: float, high: float, text: str) -> float:
    value = float(text)
    if not low <= value <= high:
        raise ValueError(text)
    return value


def _name(text: str) -> str:
    if any(character.isspace() or character == "/" for character in text):
        raise ValueError(text)
    return text


def _path(text: str) -> Path:
    if "\0" in text:
        raise ValueError(text)
    return Path(text).expanduser().absolute()


def _command(text: str) -> Path:
    """A bare command stays bare, to be found on the PATH; whatever has a folder becomes absolute."""
    return Path(text) if os.sep not in text else _path(text)


# A field's type carries what its variable must look like.
Switch = Annotated[bool, _Format("0 or 1", lambda text: bool(_one_of(0, 1)(text)))]
CppStandard = Annotated[int, _Format("20, 23 or 26 (the headers are C++20)", _one_of(20, 23, 26))]
IndexBits = Annotated[int, _Format("32 or 64", _one_of(32, 64))]
ServiceLevel = Annotated[int | None, _Format("an InfiniBand service level, 0 to 15", _one_of(*range(16)))]
Gbs = Annotated[float | None, _Format("a number of GB/s from 1 to 100000", lambda text: _between(1, 100000, text))]
DeviceName = Annotated[str, _Format("the name of a network device, such as mlx5_0", _name)]
Folder = Annotated[Path, _Format("a folder", _path)]
OptionalFolder = Annotated[Path | None, _Format("a folder", _path)]
Compiler = Annotated[Path | None, _Format("a compiler's path, or its name on the PATH", _command)]


@dataclass(frozen=True)
class Environment:
    """The settings of one buffer; ``Environment()`` holds the defaults and looks at no variable."""

    # General
    buffer_debug: Switch = False
    suppress_nccl_check: Switch = False
    avoid_record_stream: Switch = False
    num_topk_idx_bits: IndexBits = 64
    reuse_nccl_comm: Switch = True
    disable_gin: Switch = False
    nvlink_gbs: Gbs = None
    # Network
    nic_name: DeviceName = "mlx5_0"
    override_rdma_sl: ServiceLevel = None
    # JIT
    jit_debug: Switch = False
    jit_cache_dir: Folder = field(default_factory=lambda: _path("~/.deep_ep"))
    jit_nvcc_compiler: Compiler = None
    jit_cpp_standard: CppStandard = 20
    jit_print_compiler_command: Switch = False
    jit_ptxas_verbose: Switch = False
    jit_ptxas_check: Switch = False
    jit_with_lineinfo: Switch = False
    jit_dump_asm: Switch = False
    jit_dump_ptx: Switch = False
    jit_dump_sass: Switch = False
    # Debug
    gin_gdaki_debug: Switch = False
    use_nvidia_tools: Switch = False
    disable_barrier_profiling: Switch = False
    # Places
    nccl_root_dir: OptionalFolder = None


def variable_of(field_name: str) -> str:
    """The variable that sets a field of Environment."""
    return PREFIX + field_name.upper()


def read(environ: Mapping[str, str] = os.environ) -> Environment:
    """Read and check all variables.

    Args:
        environ: names and values, as os.environ.

    Returns:
        the settings; a variable that is unset or empty leaves its field's default.

    Raises:
        EPEnvironmentError: a value is malformed, or a name looks like a misspelt one of ours; it names the variable.
    """
    formats = {variable_of(name): hint.__metadata__[0] for name, hint in _fields().items()}
    for name in environ:
        if name.startswith(PREFIX) and name not in formats:
            _reject_misspelt(name, list(formats))
    values = {}
    for name in _fields():
        variable = variable_of(name)
        text = environ.get(variable, "").strip()
        if text:
            values[name] = _parse(variable, text, formats[variable])
    return Environment(**values)


def require_index_bits(environment: Environment) -> None:
    """Raise EPEnvironmentError if EP_NUM_TOPK_IDX_BITS has changed since deep_ep was imported."""
    bits = environment.num_topk_idx_bits
    if bits != NUM_TOPK_IDX_BITS:
        raise EPEnvironmentError(
            f"EP_NUM_TOPK_IDX_BITS says {bits}, but it said {NUM_TOPK_IDX_BITS} when deep_ep was imported, which is "
            f"when topk_idx_t was fixed; set it to {bits} before the import, or to {NUM_TOPK_IDX_BITS}"
        )


def _fields() -> dict[str, Any]:
    return get_type_hints(Environment, include_extras=True)


def _parse(variable: str, text: str, form: _Format) -> Any:
    try:
        return form.parse(text)
    except (ValueError, RuntimeError) as error:  # RuntimeError: a path with ~ where nobody has a home
        message = f"{variable} must be {form.expected}, but it is {text!r}; correct or unset it"
        raise EPEnvironmentError(message) from error


def _reject_misspelt(name: str, known: list[str]) -> None:
    near = difflib.get_close_matches(name, known, n=1, cutoff=NEARLY)
    if near:
        raise EPEnvironmentError(f"{name} is no setting of deep_ep; did you mean {near[0]}? Rename or unset it")
    if name.startswith(OWN_PREFIX):
        settings = ", ".join(variable for variable in known if variable.startswith(OWN_PREFIX))
        raise EPEnvironmentError(f"{name} is no setting of deep_ep; unset it, or use one of {settings}")


# The width of topk_idx_t, which exists from the import on. What is wrong with the variable is said when a buffer is
# built: importing raises nothing.
NUM_TOPK_IDX_BITS = 32 if os.environ.get("EP_NUM_TOPK_IDX_BITS", "").strip() == "32" else 64
