"""Every EP_* variable: defaults, good and bad values, misspelt names, and that docs/environment.md tells the same."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from deep_ep.environment import NUM_TOPK_IDX_BITS, Environment, read, require_index_bits, variable_of
from deep_ep.errors import EPEnvironmentError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "environment.md"
SWITCHES = [setting.name for setting in dataclasses.fields(Environment) if setting.type == "Switch"]


def test_nothing_set_gives_the_defaults() -> None:
    assert read({}) == Environment()
    assert Environment().reuse_nccl_comm
    assert Environment().num_topk_idx_bits == 64
    assert Environment().jit_cache_dir.name == ".deep_ep"


def test_the_process_environment_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_NIC_NAME", "mlx5_7")
    assert read().nic_name == "mlx5_7"


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_0_or_1(name: str) -> None:
    assert getattr(read({variable_of(name): "0"}), name) is False
    assert getattr(read({variable_of(name): "1"}), name) is True
    with pytest.raises(EPEnvironmentError, match=rf"{variable_of(name)} must be 0 or 1, but it is 'yes'"):
        read({variable_of(name): "yes"})


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("EP_NUM_TOPK_IDX_BITS", "32", 32),
        ("EP_OVERRIDE_RDMA_SL", "15", 15),
        ("EP_JIT_CPP_STANDARD", "23", 23),
        ("EP_NIC_NAME", "bnxt_re0", "bnxt_re0"),
        ("EP_NVLINK_GBS", "365.5", 365.5),
        ("EP_JIT_NVCC_COMPILER", "nvcc", Path("nvcc")),
        ("EP_JIT_NVCC_COMPILER", "/opt/cuda/bin/nvcc", Path("/opt/cuda/bin/nvcc")),
        ("EP_JIT_CACHE_DIR", "~/kernels", Path.home() / "kernels"),
        ("EP_JIT_CACHE_DIR", "kernels", Path.cwd() / "kernels"),
        ("EP_NCCL_ROOT_DIR", "/opt/nccl", Path("/opt/nccl")),
    ],
)
def test_a_good_value(variable: str, text: str, value: object) -> None:
    assert getattr(read({variable: text}), variable.removeprefix("EP_").lower()) == value


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_value_counts_as_unset(text: str) -> None:
    assert read({"EP_NUM_TOPK_IDX_BITS": text, "EP_NIC_NAME": text}) == Environment()


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("EP_NUM_TOPK_IDX_BITS", "16"),
        ("EP_NUM_TOPK_IDX_BITS", "0x20"),
        ("EP_OVERRIDE_RDMA_SL", "16"),
        ("EP_OVERRIDE_RDMA_SL", "-1"),
        ("EP_JIT_CPP_STANDARD", "17"),
        ("EP_JIT_CPP_STANDARD", "c++20"),
        ("EP_JIT_DEBUG", "2"),
        ("EP_NVLINK_GBS", "0"),
        ("EP_NVLINK_GBS", "fast"),
        ("EP_NVLINK_GBS", "nan"),
        ("EP_NIC_NAME", "mlx5_0 mlx5_1"),
        ("EP_JIT_CACHE_DIR", "~nobody-has-this-name/x"),
    ],
)
def test_a_bad_value_is_named(variable: str, text: str) -> None:
    with pytest.raises(EPEnvironmentError, match=f"^{variable} must be .* but it is {re.escape(repr(text))}"):
        read({variable: text})


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("EP_BUFFER_DEBGU", "EP_BUFFER_DEBUG"),
        ("EP_NICNAME", "EP_NIC_NAME"),
        ("EP_JIT_CACHE", "EP_JIT_CACHE_DIR"),
        ("EP_REUSE_NCCL_COMMS", "EP_REUSE_NCCL_COMM"),
        ("EP_SUPRESS_NCCL_CHECK", "EP_SUPPRESS_NCCL_CHECK"),
    ],
)
def test_a_misspelt_name_is_an_error(misspelt: str, meant: str) -> None:
    with pytest.raises(EPEnvironmentError, match=rf"{misspelt} is no setting of deep_ep; did you mean {meant}\?"):
        read({misspelt: "1"})


def test_every_name_behind_the_jit_prefix_is_ours() -> None:
    with pytest.raises(EPEnvironmentError, match=r"EP_JIT_TURBO is no setting.*EP_JIT_CACHE_DIR"):
        read({"EP_JIT_TURBO": "1"})


@pytest.mark.parametrize("foreign", ["EP_SIZE", "EP_RANK", "EP_WORLD_SIZE", "EP_BUFFER_SIZE", "EPOCH", "NCCL_DEBUG"])
def test_names_of_others_are_left_alone(foreign: str) -> None:
    assert read({foreign: "8"}) == Environment()


def test_the_document_holds_every_variable_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(EP_\w+)` \| (\S+) \| \S.* \|$", DOCUMENT.read_text(), flags=re.MULTILINE))
    assert rows == {variable_of(name): _as_documented(value) for name, value in vars(Environment()).items()}


def _as_documented(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, Path):
        return f"`{str(value).replace(str(Path.home()), '~')}`"
    return f"`{int(value)}`" if isinstance(value, bool) else f"`{value}`"


def test_nothing_else_reads_a_variable() -> None:
    """But the width of indices, which is fixed at import. (Variables of others, such as CUDA_HOME, are no settings.)"""
    asks = re.compile(r"\b(?:environ\.get\(|environ\[|getenv\()\W*(EP_\w+)")
    files = [path for suffix in ("py", "cuh", "hpp", "cpp") for path in (ROOT / "deep_ep").rglob(f"*.{suffix}")]
    found = {(path.name, name) for path in files for name in asks.findall(path.read_text())}
    assert found == {("environment.py", "EP_NUM_TOPK_IDX_BITS")}


def test_the_width_of_indices_is_fixed_at_import() -> None:
    require_index_bits(Environment(num_topk_idx_bits=NUM_TOPK_IDX_BITS))
    other = 96 - NUM_TOPK_IDX_BITS
    complaint = f"EP_NUM_TOPK_IDX_BITS says {other}, but it said {NUM_TOPK_IDX_BITS} when deep_ep was imported"
    with pytest.raises(EPEnvironmentError, match=complaint):
        require_index_bits(Environment(num_topk_idx_bits=other))


def test_every_variable_that_is_spoken_of_exists() -> None:
    """In messages, comments, scripts and pages: a name that was changed, or forgotten in the document, shows here."""
    known = {variable_of(setting.name) for setting in dataclasses.fields(Environment)}
    examples = {"EP_SIZE", "EP_BUFFER_SIZE", "EP_BUFFER_DEBGU", "EP_NICNAME", "EP_JIT_"}  # of what is none
    headers = "".join(path.read_text() for path in (ROOT / "deep_ep").rglob("*.cuh"))
    macros = set(re.findall(r"#define (EP_\w+)", headers))
    pages = [ROOT / "README.md", ROOT / "Makefile"]
    for folder, pattern in (("deep_ep", "*.py"), ("docs", "*.md"), ("scripts", "*"), ("benchmarks", "*.py")):
        pages += [path for path in (ROOT / folder).rglob(pattern) if path.is_file() and "__pycache__" not in path.parts]
    for page in pages:
        spoken = set(re.findall(r"\bEP_[A-Z0-9_]+\b", page.read_text()))
        assert spoken - known - examples - macros == set(), f"{page.name} speaks of variables that do not exist"
