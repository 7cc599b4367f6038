"""Two benches on which a probe kernel runs, simulated ranks and a GPU: the same call, the same result."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from deep_ep import jit
from deep_ep.machine.world import Launch, World

KERNELS = Path(__file__).parent / "kernels"
Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class ProbeConfig:
    variant: int


class ProbeArgs(ctypes.Structure):
    _fields_ = [
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("window", ctypes.c_void_p),
        ("peer", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("rank", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Probe:
    """A launch of one of the kernels in kernels/.

    Attributes:
        inputs: of each rank, uint32; their number is the number of ranks.
        num_outputs: words that each rank writes; they start as 0xEEEEEEEE.
        seed: simulation only.
    """

    name: str
    inputs: Sequence[Words]
    num_outputs: int
    variant: int = 0
    count: int = 0
    num_blocks: int = 1
    num_threads: int = 32
    shared_bytes: int = 0
    window_bytes: int = 4096
    cluster_blocks: int = 1
    seed: int = 0
    patience: str = "report"

    @property
    def kernel(self) -> jit.Kernel:
        return jit.Kernel(self.name, ProbeConfig(self.variant), ProbeArgs, self.num_threads, header=f"{self.name}.cuh")


@dataclass(frozen=True)
class Outcome:
    outputs: list[Words]
    windows: list[bytes]


class Bench(Protocol):
    def run(self, probe: Probe) -> Outcome: ...


class SimulatedBench:
    """All ranks in one simulated world."""

    def __init__(self, world: World, defines: tuple[str, ...] = ()) -> None:
        self.world = world
        self.toolchain = jit.Gxx(
            race_detector=world.race_detector, defines=defines, more_include_dirs=(KERNELS,), artifact_name="kernel.so"
        )

    def run(self, probe: Probe) -> Outcome:
        artifact = jit.build(probe.kernel, self.toolchain).artifact
        with self._regions(probe) as regions:
            launches = []
            for rank, (source, output, window) in enumerate(regions):
                peer = regions[(rank + 1) % len(regions)][2]
                args = ProbeArgs(source, output, window, peer, probe.count, rank)
                launches.append(
                    Launch(
                        artifact,
                        probe.name,
                        bytes(args),
                        rank,
                        probe.num_blocks,
                        probe.num_threads,
                        probe.shared_bytes,
                        probe.cluster_blocks,
                    )
                )
            self.world.launch(launches, seed=probe.seed, patience=probe.patience)  # type: ignore[arg-type]
            return Outcome(
                [np.frombuffer(self.world.read(at, 4 * probe.num_outputs), np.uint32) for _, at, _ in regions],
                [self.world.read(at, probe.window_bytes) for _, _, at in regions],
            )

    @contextmanager
    def _regions(self, probe: Probe) -> Iterator[list[tuple[int, int, int]]]:
        regions = []
        for rank, words in enumerate(probe.inputs):
            source = self.world.allocate(words.nbytes, name=f"input of rank {rank}")
            self.world.write(source, words.tobytes())
            output = self.world.allocate(4 * probe.num_outputs, fill=0xEE, name=f"output of rank {rank}")
            regions.append((source, output, self.world.allocate(probe.window_bytes, name=f"window of rank {rank}")))
        try:
            yield regions
        finally:
            if self.world.is_alive:
                for addresses in regions:
                    for address in addresses:
                        self.world.free(address)


class CudaBench:
    """One GPU for all ranks: each has a stream of its own, so that their few blocks run together."""

    def __init__(self) -> None:
        import torch
        from cuda.bindings import driver

        self._torch: Any = torch
        self._driver: Any = driver
        torch.zeros(1, device="cuda")  # makes the primary context current
        properties = torch.cuda.get_device_properties(0)
        self._architecture = f"sm_{properties.major}{properties.minor}a"

    def run(self, probe: Probe) -> Outcome:
        torch = self._torch
        built = jit.build(probe.kernel, jit.Nvrtc(self._architecture, more_include_dirs=(KERNELS,)))
        module = self._call("cuModuleLoadData", built.code)
        function = self._call("cuModuleGetFunction", module, probe.kernel.entry.encode())
        sources = [torch.from_numpy(words.view(np.int32).copy()).cuda() for words in probe.inputs]
        outputs = [torch.full((probe.num_outputs,), -0x11111112, dtype=torch.int32, device="cuda") for _ in sources]
        windows = [torch.zeros(probe.window_bytes, dtype=torch.uint8, device="cuda") for _ in sources]
        streams = [torch.cuda.Stream() for _ in sources]
        torch.cuda.synchronize()
        for rank, stream in enumerate(streams):
            peer = windows[(rank + 1) % len(windows)]
            addresses = [tensor.data_ptr() for tensor in (sources[rank], outputs[rank], windows[rank], peer)]
            self._launch(function, probe, ProbeArgs(*addresses, probe.count, rank), stream.cuda_stream)
        torch.cuda.synchronize()
        return Outcome(
            [output.cpu().numpy().view(np.uint32) for output in outputs],
            [window.cpu().numpy().tobytes() for window in windows],
        )

    def _launch(self, function: Any, probe: Probe, args: ProbeArgs, stream: int) -> None:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = probe.num_blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = probe.num_threads, 1, 1
        config.sharedMemBytes = probe.shared_bytes
        config.hStream = stream
        if probe.cluster_blocks > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = probe.cluster_blocks
            attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
            config.attrs, config.numAttrs = [attribute], 1
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        self._call("cuLaunchKernelEx", config, function, ctypes.addressof(pointers), 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, name)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {status.name}")
        return values[0] if values else None
