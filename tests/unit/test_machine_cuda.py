"""What a launch tells the driver, and which hosts are refused: a made-up driver with cuda.bindings' own structures."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_ep import jit
from deep_ep.environment import Environment
from deep_ep.errors import EPEnvironmentError, EPError
from deep_ep.machine import cuda, raise_together
from deep_ep.machine.meeting import Limits

driver = pytest.importorskip("cuda.bindings.driver")

ROOT = Path(__file__).resolve().parents[2]
SUCCESS = driver.CUresult.CUDA_SUCCESS
INVALID_CONTEXT = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
TOO_LARGE = driver.CUresult.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE


class CopyArgs(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("num_words", ctypes.c_int))


@dataclass(frozen=True)
class CopyConfig:
    num_warps: int = 4


COPY = jit.Kernel("copy", CopyConfig(), CopyArgs, num_threads=128)


class FakeDriver:
    """Structures and enums are the real ones; calls are recorded."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.launches: list[tuple[Any, bytes]] = []
        self.statuses = [SUCCESS] * 100
        self.dynamic_bytes = 0
        self.attribute_status = SUCCESS

    def __getattr__(self, name: str) -> Any:
        return getattr(driver, name)

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, str]:  # noqa: N802
        self.calls.append(f"load {code!r}")
        return SUCCESS, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, str]:  # noqa: N802
        self.calls.append(f"get {name.decode()} of {module}")
        return SUCCESS, "function"

    def cuModuleUnload(self, module: str) -> tuple[Any]:  # noqa: N802
        self.calls.append(f"unload {module}")
        return (SUCCESS,)

    def cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[Any, int]:  # noqa: N802
        names = driver.CUdevice_attribute
        khz_and_bits = {
            names.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: 3201000,
            names.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: 6144,
        }
        return self.attribute_status, khz_and_bits[attribute]

    def cuFuncGetAttribute(self, attribute: Any, function: str) -> tuple[Any, int]:  # noqa: N802
        assert (attribute, function) == (driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, "function")
        return SUCCESS, 1024

    def cuFuncSetAttribute(self, function: str, attribute: Any, value: int) -> tuple[Any]:  # noqa: N802
        assert attribute == driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.dynamic_bytes = value
        return (SUCCESS,)

    def cuLaunchKernelEx(self, config: Any, function: str, parameters: int, extra: int) -> tuple[Any]:  # noqa: N802
        assert (function, extra) == ("function", 0)
        (address,) = (ctypes.c_void_p * 1).from_address(parameters)
        assert address is not None
        self.launches.append((config, ctypes.string_at(address, ctypes.sizeof(CopyArgs))))
        return (self.statuses.pop(0),)

    def cuStreamGetCaptureInfo(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        assert stream == 0x99
        return SUCCESS, driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE, 41, "graph", [], [], 0

    def cuCtxSetCurrent(self, context: str) -> tuple[Any]:  # noqa: N802
        self.calls.append(f"make {context} current")
        return (SUCCESS,)

    def cuGetErrorName(self, status: Any) -> tuple[Any, bytes]:  # noqa: N802
        return SUCCESS, status.name.encode()

    def cuGetErrorString(self, status: Any) -> tuple[Any, bytes]:  # noqa: N802
        return SUCCESS, b"in words"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> cuda.CudaMachine:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(jit.builder, "build", lambda kernel, toolchain: SimpleNamespace(code=b"cubin"))
    monkeypatch.setattr(jit, "default_toolchain", lambda kernel, architecture, environment: architecture)
    machine = object.__new__(cuda.CudaMachine)  # without a group and a GPU
    vars(machine).update(
        device=torch.device("cuda", 0),
        shared_bytes_per_block=232448,
        _architecture="sm_90a",
        _context="context",
        _driver=FakeDriver(),
        _environment=Environment(),
        _loaded={},
        _windows=[],
        _communicator=SimpleNamespace(close=lambda together: None),
        _closed=False,
    )
    return machine


def fake_of(machine: cuda.CudaMachine) -> FakeDriver:
    fake: FakeDriver = machine._driver
    return fake


def launch(machine: cuda.CudaMachine, args: ctypes.Structure, stream: Any = 0x77, **options: Any) -> None:
    machine.launch(COPY, args, num_blocks=3, shared_bytes=4096, stream=stream, reads=[], writes=[], **options)


def test_a_launch_passes_the_whole_structure_as_one_parameter(machine: cuda.CudaMachine) -> None:
    args = CopyArgs(0x1234, 99)
    launch(machine, args)
    (config, seen), fake = fake_of(machine).launches[0], fake_of(machine)
    assert seen == bytes(args)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (3, 1, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (128, 1, 1)
    assert config.sharedMemBytes == 4096
    assert int(config.hStream) == 0x77
    assert config.numAttrs == 0
    assert fake.calls == ["load b'cubin'", "get deep_ep_copy of module"]
    assert fake.dynamic_bytes == 232448 - 1024


def test_a_kernel_is_loaded_once_and_a_launch_shape_made_once(machine: cuda.CudaMachine) -> None:
    machine.prepare([COPY])
    for num_words in range(5):
        launch(machine, CopyArgs(0, num_words))
    launches = fake_of(machine).launches
    assert len(fake_of(machine).calls) == 2
    assert all(config is launches[0][0] for config, _ in launches)
    launch(machine, CopyArgs(), stream=SimpleNamespace(cuda_stream=0x88))  # as torch.cuda.Stream
    assert launches[-1][0] is not launches[0][0]


def test_a_thread_without_the_context_gets_it(machine: cuda.CudaMachine) -> None:
    fake_of(machine).statuses.insert(0, INVALID_CONTEXT)
    launch(machine, CopyArgs())
    assert "make context current" in fake_of(machine).calls
    assert len(fake_of(machine).launches) == 2


def test_the_speed_of_memory(machine: cuda.CudaMachine) -> None:
    """An H200's, as the driver has it; no error if it does not say."""
    assert machine._memory_gbs() == pytest.approx(4916.7, abs=0.1)
    fake_of(machine).attribute_status = driver.CUresult.CUDA_ERROR_NOT_SUPPORTED
    assert machine._memory_gbs() is None


def test_a_failed_launch_names_kernel_shape_and_reason(machine: cuda.CudaMachine) -> None:
    fake_of(machine).statuses.insert(0, TOO_LARGE)
    with pytest.raises(EPError, match=r"copy \(3 blocks x 128 threads, 4096 bytes.*LAUNCH_TOO_LARGE: in words"):
        launch(machine, CopyArgs())


def test_arguments_of_another_kernel_are_refused(machine: cuda.CudaMachine) -> None:
    class OtherArgs(ctypes.Structure):
        _fields_ = (("y", ctypes.c_int),)

    with pytest.raises(TypeError, match="copy takes a CopyArgs, but args is a OtherArgs"):
        launch(machine, OtherArgs())


def test_loading_inside_a_graph_capture_is_named(machine: cuda.CudaMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(EPError, match=r"copy is used for the first time .* inside a CUDA graph capture"):
        launch(machine, CopyArgs())
    with pytest.raises(EPError, match="inside a CUDA graph capture"):
        machine.allocate_window(1)


def test_the_machine_closes_once_and_gives_back_what_it_took(machine: cuda.CudaMachine) -> None:
    machine.prepare([COPY])
    machine.close()
    machine.close()
    assert fake_of(machine).calls.count("unload module") == 1


def test_a_closed_machine_launches_nothing(machine: cuda.CudaMachine) -> None:
    """A handler of a signal may destroy a buffer between the two launches of a dispatch."""
    launch(machine, CopyArgs())
    machine.close()
    with pytest.raises(EPError, match="cannot be used any more: it was closed"):
        launch(machine, CopyArgs())
    assert len(fake_of(machine).launches) == 1


@pytest.mark.parametrize("together", [False, True])
def test_nothing_is_given_back_before_the_device_is_done(
    machine: cuda.CudaMachine, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """And the registration goes before its communicator; modules are unloaded in their own device's context."""
    calls = fake_of(machine).calls
    machine.prepare([COPY])
    calls.clear()

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        calls.append(f"enter {device}")
        yield
        calls.append(f"leave {device}")

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(f"synchronize {device}"))
    machine._windows.append(SimpleNamespace(close=lambda: calls.append("close window")))
    machine._communicator.close = lambda together: calls.append(f"close communicator, together: {together}")
    machine.close(together=together)
    assert calls == [
        "synchronize cuda:0",
        "close window",
        f"close communicator, together: {together}",
        "enter cuda:0",
        "unload module",
        "leave cuda:0",
    ]


def test_windows_of_different_sizes_are_refused(machine: cuda.CudaMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    gather: Callable[[int, str], list[int]] = lambda num_bytes, what: [num_bytes, num_bytes + 1]  # noqa: E731
    monkeypatch.setattr(machine, "all_gather_object", gather)
    with pytest.raises(ValueError, match=r"by rank it is \[4, 5\]"):
        machine.allocate_window(4)


def test_an_old_driver_is_refused() -> None:
    cuda.check_driver(13000)
    cuda.check_driver(13020)
    with pytest.raises(EPEnvironmentError, match=r"for CUDA 12\.8, but deep_ep needs one for CUDA 13\.0.*driver 580"):
        cuda.check_driver(12080)


def test_an_old_gpu_is_refused() -> None:
    cuda.check_device("NVIDIA H200", (9, 0))
    cuda.check_device("NVIDIA B200", (10, 0))
    with pytest.raises(EPEnvironmentError, match=r"NVIDIA A100 has compute capability 8\.0, but .* 9\.0"):
        cuda.check_device("NVIDIA A100", (8, 0))


def test_a_problem_of_one_rank_is_told_to_all(machine: cuda.CudaMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "all_gather_object", lambda value, what: [None, "its driver is old"])
    with pytest.raises(EPEnvironmentError, match="rank 1 of the group cannot take part: its driver is old"):
        raise_together(None, machine.all_gather_object, EPEnvironmentError)
    with pytest.raises(EPEnvironmentError, match=r"^mine$"):
        raise_together(EPEnvironmentError("mine"), machine.all_gather_object)


STEPS = ("allocate", "register")


@pytest.mark.parametrize("failing", STEPS)
@pytest.mark.parametrize("here", [True, False])
def test_a_rank_without_memory_tells_its_peers(
    machine: cuda.CudaMachine, monkeypatch: pytest.MonkeyPatch, failing: str, here: bool
) -> None:
    """Or one whose window cannot be registered, for whatever reason."""

    def step(name: str, result: Any) -> Any:
        steps.append(name)
        if here and name == failing:
            raise torch.OutOfMemoryError("no memory")
        return result

    def gather(value: Any, what: str) -> list[Any]:
        if what == "to allocate the window":
            return [value, value]
        told.append(value)
        return [value, "no memory" if not here and steps[-1] == failing else None]

    steps: list[str] = []
    told: list[str | None] = []
    monkeypatch.setattr(machine, "all_gather_object", gather)
    monkeypatch.setattr(cuda.nccl, "allocate", lambda *_: step("allocate", torch.zeros(4)))
    register = lambda memory: step("register", ("window", (1, 2)))  # noqa: E731
    machine._communicator = SimpleNamespace(register=register)  # type: ignore[assignment]
    if here:
        with pytest.raises(torch.OutOfMemoryError):
            machine.allocate_window(4)
    else:
        with pytest.raises(EPError, match="rank 1 of the group cannot take part: no memory"):
            machine.allocate_window(4)
    assert steps == list(STEPS[: STEPS.index(failing) + 1])
    assert told[-1] == ("OutOfMemoryError: no memory" if here else None)
    # What was registered is undone with the machine.
    assert len(machine._windows) == (failing == "register" and not here)


@pytest.mark.parametrize("failing", ["look", "warm up"])
def test_any_failure_of_a_host_is_told(
    machine: cuda.CudaMachine, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Not only what we know by name: a rank that says nothing leaves its peers waiting."""

    def fail(*_: Any) -> None:
        raise OSError("libcuda.so.1 is a text file")

    told: list[str | None] = []
    monkeypatch.setattr(cuda, "Meeting", lambda *_: SimpleNamespace(all_gather=lambda value, *_: [told.append(value)]))
    monkeypatch.setattr(cuda.CudaMachine, "_look_at_host", fail if failing == "look" else lambda self: None)
    monkeypatch.setattr(cuda.nccl, "warm_up", fail)
    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1, bound_device_id=torch.device("cuda", 0))
    with pytest.raises(OSError, match="is a text file"):
        cuda.CudaMachine(group, Environment(), Limits())
    assert told == [None] * (failing == "warm up") + ["OSError: libcuda.so.1 is a text file"]


def test_captures_have_numbers(machine: cuda.CudaMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.current_capture() == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0x99))
    assert machine.current_capture() == 41


def test_a_capture_is_of_the_machines_device(machine: cuda.CudaMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is the current one."""
    current = [1]

    @contextlib.contextmanager
    def within(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", within)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current == [0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0x99))
    assert machine.current_capture() == 41
    assert current == [1]


def test_importing_loads_no_gpu_package() -> None:
    # torch itself imports cuda.bindings where it is installed.
    code = "import sys, deep_ep.machine.cuda; print([m for m in sys.modules if m.startswith(('nccl', 'cuda.core'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
