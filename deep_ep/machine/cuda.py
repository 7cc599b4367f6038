"""A GPU of a group: driver-API launches of kernels that the JIT built, on memory that NCCL maps into all ranks."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from deep_ep import jit
from deep_ep.environment import Environment
from deep_ep.errors import EPEnvironmentError, EPError
from deep_ep.machine import do_together, import_cuda_extra, links, nccl
from deep_ep.machine.meeting import Limits, Meeting

logger = logging.getLogger("deep_ep")

T = TypeVar("T")

OLDEST_CAPABILITY = (9, 0)  # bulk copies and mbarriers
OLDEST_DRIVER = 13000  # as cuDriverGetVersion says it; what the JIT builds is for CUDA 13
INVALID_CONTEXT, INVALID_HANDLE = 201, 400  # CUresult values of a launch from a thread whose current device is another
MAX_LAUNCH_SHAPES = 256  # kept per kernel


class CudaWindow:
    """Symmetric memory of this rank, registered with NCCL."""

    def __init__(self, communicator: nccl.Communicator, memory: torch.Tensor, num_bytes: int) -> None:
        self._communicator = communicator
        self._memory: torch.Tensor | None = memory
        self._window, self.addresses = communicator.register(memory)
        self.num_bytes = num_bytes

    def part(self, offset: int, num_bytes: int) -> torch.Tensor:
        assert self._memory is not None
        return self._memory[offset : offset + num_bytes]

    def close(self) -> None:
        if self._memory is None:
            return
        # The pages stay mapped until the registration has gone.
        self._communicator.deregister(self._window)
        self._window, self._memory = None, None


class PinnedWords:
    """Page-locked words; one address serves host and device (unified addressing)."""

    def __init__(self, count: int) -> None:
        self.tensor = torch.zeros(count, dtype=torch.int32, pin_memory=True)
        self.address = self.tensor.data_ptr()

    def close(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.int32)
        self.address = 0


@dataclass
class _LoadedKernel:
    """A kernel in this device's context, and the launch configurations it was given so far."""

    kernel: jit.Kernel
    module: Any
    function: Any
    configs: dict[tuple[int, int, int], Any] = field(default_factory=dict)


class CudaMachine:
    """See deep_ep.machine.Machine; launches are asynchronous on the given stream."""

    name = "cuda"
    gone: Mapping[int, str] = {}  # nobody on this host knows
    launches_finish = False

    def __init__(self, group: dist.ProcessGroup, environment: Environment, limits: Limits) -> None:
        self._environment = environment
        self.rank, self.num_ranks = group.rank(), group.size()
        self.device = group.bound_device_id or torch.device("cuda", torch.cuda.current_device())
        self._refuse_capture("a deep_ep buffer cannot be built")
        self._meeting = Meeting(group, limits)
        do_together(self._look_at_host, self.all_gather_object, EPEnvironmentError)
        do_together(lambda: nccl.warm_up(group, self.device), self.all_gather_object)
        do_together(self._open_device, self.all_gather_object)
        self._loaded: dict[int, _LoadedKernel] = {}  # by the kernel's id: to hash all that it holds takes long
        self._windows: list[CudaWindow] = []
        self._communicator = nccl.Communicator(group, self.device, environment, self.all_gather_object)
        self._closed = False

    def _open_device(self) -> None:
        properties = torch.cuda.get_device_properties(self.device)
        self.num_sms = properties.multi_processor_count
        self.wire_gbs = links.wire_gbs(self.device)
        self._architecture = f"sm_{properties.major}{properties.minor}a"
        # High priority: its few blocks are what peers wait for, so they go ahead of a compute kernel's next wave.
        self.comm_stream = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.device):
            self._context = self._call("cuCtxGetCurrent")
            most = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            self.shared_bytes_per_block = self._call("cuDeviceGetAttribute", most, self.device.index)
            self.memory_gbs = self._memory_gbs()

    def _memory_gbs(self) -> float | None:
        """By clock and width: two transfers a clock."""
        names = self._driver.CUdevice_attribute
        asked = names.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, names.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH
        try:
            khz, bits = (int(self._call("cuDeviceGetAttribute", each, self.device.index)) for each in asked)
        except EPError as error:  # the figure only helps to choose a number of SMs
            logger.debug("the speed of %s's memory is unknown: %s", self.device, error)
            return None
        return 2 * khz * bits / 8 / 1e6 or None

    def _look_at_host(self) -> None:
        """Raise whatever is wrong with this rank's host."""
        self._driver = import_cuda_extra("cuda.bindings.driver")
        version = self._call("cuDriverGetVersion")
        check_driver(version)
        check_device(torch.cuda.get_device_name(self.device), torch.cuda.get_device_capability(self.device))
        library = nccl.check(self._environment)
        logger.debug("rank %d: %s, driver for CUDA %s, %s", self.rank, self.device, _cuda_text(version), library)

    def allocate_window(self, num_bytes: int) -> CudaWindow:
        self._refuse_capture("a window cannot be allocated")
        sizes = self.all_gather_object(num_bytes, "to allocate the window")
        if len(set(sizes)) > 1:
            raise ValueError(f"num_bytes must be the same on all ranks, but by rank it is {sizes}")
        with torch.cuda.device(self.device):
            memory = do_together(lambda: nccl.allocate(num_bytes, self.device), self.all_gather_object)
            do_together(lambda: self._register(memory, num_bytes), self.all_gather_object)
        window = self._windows[-1]
        self.meet("to use the window")
        return window

    def _register(self, memory: torch.Tensor, num_bytes: int) -> None:
        # Noted at once: where a peer fails, this rank's registration is undone with the machine.
        self._windows.append(CudaWindow(self._communicator, memory, num_bytes))

    def host_words(self, count: int) -> PinnedWords:
        return PinnedWords(count)

    def prepare(self, kernels: Iterable[jit.Kernel]) -> None:
        missing = [kernel for kernel in kernels if id(kernel) not in self._loaded]
        for kernel in missing:
            self._refuse_capture(f"kernel {kernel.name} is used for the first time and cannot be loaded")
        for kernel, built in zip(missing, jit.precompile(missing, self._toolchain_of), strict=True):
            self._loaded[id(kernel)] = self._load(kernel, built)

    def _toolchain_of(self, kernel: jit.Kernel) -> jit.Toolchain:
        return jit.default_toolchain(kernel, self._architecture, self._environment)

    def _load(self, kernel: jit.Kernel, built: jit.Built) -> _LoadedKernel:
        with torch.cuda.device(self.device):
            module = self._call("cuModuleLoadData", built.code)
            function = self._call("cuModuleGetFunction", module, kernel.entry.encode())
            attribute = self._driver.CUfunction_attribute
            static = self._call("cuFuncGetAttribute", attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
            most = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, most, self.shared_bytes_per_block - static)
        return _LoadedKernel(kernel, module, function)

    def launch(
        self,
        kernel: jit.Kernel,
        args: ctypes.Structure,
        *,
        num_blocks: int,
        shared_bytes: int,
        stream: Any,
        reads: Sequence[torch.Tensor | None],
        writes: Sequence[torch.Tensor | None],
        meets_peers: bool = True,
    ) -> None:
        # The hot path: two dictionary look-ups, one pointer, one driver call.
        if not isinstance(args, kernel.args):
            raise TypeError(f"{kernel.name} takes a {kernel.args.__name__}, but args is a {type(args).__name__}")
        loaded = self._loaded.get(id(kernel))
        if loaded is None:
            if self._closed:  # by a handler of a signal, in the midst of a call: the window has gone
                raise EPError("this machine cannot be used any more: it was closed")
            self.prepare([kernel])
            loaded = self._loaded[id(kernel)]
        if stream is None:
            stream = torch.cuda.current_stream(self.device)
        handle = stream if isinstance(stream, int) else stream.cuda_stream
        shape = (num_blocks, shared_bytes, handle)
        config = loaded.configs.get(shape) or self._configure(kernel, loaded, shape)
        pointer = ctypes.c_void_p(ctypes.addressof(args))  # the only parameter; the driver copies what it points to
        parameters = ctypes.addressof(pointer)
        (status,) = self._driver.cuLaunchKernelEx(config, loaded.function, parameters, 0)
        if status == 0:
            return
        if status in (INVALID_CONTEXT, INVALID_HANDLE):
            # This thread has another device current, or none yet; the next launch from it will be on the short way.
            self._call("cuCtxSetCurrent", self._context)
            (status,) = self._driver.cuLaunchKernelEx(config, loaded.function, parameters, 0)
        if status != 0:
            blocks = f"{num_blocks} blocks x {kernel.num_threads} threads, {shared_bytes} bytes of shared memory each"
            raise EPError(f"launching {kernel.name} ({blocks}) failed: {self._explain(status)}")

    def _configure(self, kernel: jit.Kernel, loaded: _LoadedKernel, shape: tuple[int, int, int]) -> Any:
        num_blocks, shared_bytes, stream = shape
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = num_blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.num_threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = self._driver.CUstream(stream)
        if len(loaded.configs) >= MAX_LAUNCH_SHAPES:
            loaded.configs.clear()
        loaded.configs[shape] = config
        return config

    def current_capture(self) -> int:
        if torch.cuda.current_device() != self.device.index:  # to ask is cheap, to enter the device's context is not
            with torch.cuda.device(self.device):
                return self._capture_of_current_device()
        return self._capture_of_current_device()

    def _capture_of_current_device(self) -> int:
        if not torch.cuda.is_current_stream_capturing():
            return 0
        _, number, *_ = self._call("cuStreamGetCaptureInfo", torch.cuda.current_stream().cuda_stream)
        return int(number)

    def meet(self, what: str, limit_s: float | None = None) -> None:
        self._meeting.all_gather(None, what, limit_s)

    def all_gather_object(self, value: T, what: str, limit_s: float | None = None) -> list[T]:
        return self._meeting.all_gather(value, what, limit_s)

    def close(self, *, together: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            torch.cuda.synchronize(self.device)
            for window in self._windows:
                window.close()
            self._communicator.close(together)
            with torch.cuda.device(self.device):  # the modules are of its context
                for loaded in self._loaded.values():
                    self._call("cuModuleUnload", loaded.module)
        except Exception as error:  # a kernel crashed before, and with it the context: nothing is left to give back
            logger.warning("closing %s failed: %s", self.device, error)
        self._loaded.clear()
        self._windows.clear()

    def _refuse_capture(self, what: str) -> None:
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                raise EPError(f"{what} inside a CUDA graph capture; do it once before the capture")

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call the driver; returns its value, or a list if it has several, or raises EPError."""
        status, *values = getattr(self._driver, function)(*arguments)
        if status != 0:
            raise EPError(f"{function} failed: {self._explain(status)}")
        return values[0] if len(values) == 1 else values

    def _explain(self, status: Any) -> str:
        texts = [self._driver.cuGetErrorName(status)[1], self._driver.cuGetErrorString(status)[1]]
        return ": ".join(text.decode() for text in texts if text)


def check_driver(version: int) -> None:
    """Raise EPEnvironmentError for a driver older than CUDA 13; ``version`` is what cuDriverGetVersion returns."""
    if version < OLDEST_DRIVER:
        raise EPEnvironmentError(
            f"the NVIDIA driver is for CUDA {_cuda_text(version)}, but deep_ep needs one for CUDA "
            f"{_cuda_text(OLDEST_DRIVER)} or newer: install driver 580 or newer"
        )


def check_device(name: str, capability: tuple[int, int]) -> None:
    """Raise EPEnvironmentError for a GPU that lacks what the kernels use."""
    if capability < OLDEST_CAPABILITY:
        raise EPEnvironmentError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, but deep_ep's kernels need "
            f"{OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Hopper) or newer; use such a GPU, or "
            "simulated ranks with a gloo group"
        )


def _cuda_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
