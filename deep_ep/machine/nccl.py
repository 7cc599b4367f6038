"""Everything that touches NCCL: which library is loaded, whose communicator is used, and windows that peers address.

nccl4py is imported inside functions only, after the library that torch loaded has been looked at: imported first, it
could load another one, and two NCCLs in one process corrupt each other's communicators.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deep_ep.environment import Environment
from deep_ep.errors import EPEnvironmentError, EPError, EPTopologyError
from deep_ep.machine import do_together, import_cuda_extra

logger = logging.getLogger("deep_ep")

Version = tuple[int, int, int]

# nccl4py wraps structures whose layout changes from one NCCL to the next: versions go in pairs that were seen to work.
NCCL4PY_OF_NCCL: dict[Version, str] = {(2, 30, 7): "0.3.1.post1", (2, 32, 3): "0.6.0"}
PREFERRED: Version = (2, 30, 7)  # what the newest torch releases ask for, so that pip can satisfy both

IN_PROGRESS = 7  # ncclInProgress: a nonblocking communicator is still at work
WINDOW_GRANULARITY = 2 << 20  # bytes; NCCL maps symmetric memory in pages of this size


@dataclass(frozen=True)
class Library:
    """The one NCCL of this process."""

    path: Path
    version: Version

    def __str__(self) -> str:
        return f"NCCL {_text(self.version)} ({self.path})"


def check(environment: Environment, maps: Path = Path("/proc/self/maps")) -> Library:
    """Look at what is loaded and installed, and import nccl4py only if it all belongs together.

    Args:
        environment: EP_SUPPRESS_NCCL_CHECK turns a wrong pair or wrong headers into a warning; EP_NCCL_ROOT_DIR names
            the headers.
        maps: the process's memory map.

    Raises:
        EPEnvironmentError: no NCCL, two of them, an untried pair of NCCL and nccl4py, or headers of another version.
    """
    library = loaded_library(maps)
    _check_pair(library, _installed_nccl4py(), environment)
    _check_headers(library, environment)
    import_cuda_extra("nccl.bindings.nccl").get_version()  # nccl4py looks for its library at the first call
    again = loaded_library(maps)
    if again.path != library.path:
        raise EPEnvironmentError(f"nccl4py uses {again}, torch {library}; {_install_line(library.version)}")
    return library


def loaded_library(maps: Path) -> Library:
    """The one libnccl in the memory map.

    Raises:
        EPEnvironmentError: there is none, or more than one.
    """
    found = sorted(set(re.findall(r"(/.*/libnccl\.so[.\d]*)(?: \(deleted\))?$", maps.read_text(), flags=re.MULTILINE)))
    if not found:
        raise EPEnvironmentError(
            "no libnccl.so is loaded, so this torch has NCCL built in, where nccl4py cannot reach it; "
            "install a torch wheel for CUDA 13 from PyPI: pip install torch 'deep_ep[cu13]'"
        )
    if len(found) > 1:
        paths = "\n".join(found)
        raise EPEnvironmentError(
            f"{len(found)} NCCL libraries are loaded in this process:\n{paths}\nKeep the one that torch loads: take "
            "the others out of LD_PRELOAD and LD_LIBRARY_PATH, or uninstall their packages; "
            f"{_install_line(PREFERRED)}"
        )
    return Library(Path(found[0]), _version_of(found[0]))


def _version_of(path: str) -> Version:
    number = ctypes.c_int()
    status = ctypes.CDLL(path).ncclGetVersion(ctypes.byref(number))
    if status != 0:
        raise EPEnvironmentError(f"ncclGetVersion of {path} failed with status {status}; {_install_line(PREFERRED)}")
    return number.value // 10000, number.value // 100 % 100, number.value % 100


def _installed_nccl4py() -> str | None:
    try:
        return importlib.metadata.version("nccl4py")
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_pair(library: Library, nccl4py: str | None, environment: Environment) -> None:
    wanted = NCCL4PY_OF_NCCL.get(library.version)
    if nccl4py is None:
        raise EPEnvironmentError(f"nccl4py is not installed, and {library} is loaded; {_install_line(library.version)}")
    if nccl4py != wanted:
        pairs = ", ".join(f"{_text(nccl)} with {ours}" for nccl, ours in NCCL4PY_OF_NCCL.items())
        _complain(
            f"{library} is loaded and nccl4py {nccl4py} is installed; the pairs known to work are {pairs}; "
            f"{_install_line(library.version)}",
            environment,
        )


def _check_headers(library: Library, environment: Environment) -> None:
    """Only kernels that cross NVLink domains include these headers: missing ones are an error only where asked for."""
    root = environment.nccl_root_dir or library.path.parent.parent
    header = root / "include" / "nccl.h"
    if not header.is_file():
        if environment.nccl_root_dir:
            raise EPEnvironmentError(f"EP_NCCL_ROOT_DIR is {root}, but there is no {header}; correct or unset it")
        return
    version = header_version(header)
    if version != library.version:
        _complain(
            f"{header} is of NCCL {_text(version)}, but {library} is loaded; unset EP_NCCL_ROOT_DIR or "
            f"{_install_line(library.version)}",
            environment,
        )


def header_version(header: Path) -> Version:
    """The version that a nccl.h states."""
    numbers = dict(re.findall(r"^#define NCCL_(MAJOR|MINOR|PATCH) (\d+)", header.read_text(), flags=re.MULTILINE))
    try:
        return int(numbers["MAJOR"]), int(numbers["MINOR"]), int(numbers["PATCH"])
    except KeyError as missing:
        raise EPEnvironmentError(f"{header} states no NCCL_{missing.args[0]}; {_install_line(PREFERRED)}") from missing


def _complain(message: str, environment: Environment) -> None:
    if not environment.suppress_nccl_check:
        raise EPEnvironmentError(f"{message} (EP_SUPPRESS_NCCL_CHECK=1 makes this a warning)")
    logger.warning("%s", message)


def _install_line(nccl: Version) -> str:
    # Both by name: nccl4py's own extra would pull in another NCCL than the one it is paired with here.
    nccl = nccl if nccl in NCCL4PY_OF_NCCL else PREFERRED
    return f"pip install 'nvidia-nccl-cu13=={_text(nccl)}' 'nccl4py=={NCCL4PY_OF_NCCL[nccl]}'"


def _text(version: Version) -> str:
    return ".".join(map(str, version))


class Communicator:
    """The NCCL communicator of a process group, borrowed, or one of our own."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        environment: Environment,
        all_gather_object: Callable[[Any, str], list[Any]],
    ) -> None:
        """Borrow or make the communicator. Collective.

        Args:
            group: a group with an nccl backend, warmed up.
            device: this rank's GPU.
            environment: EP_REUSE_NCCL_COMM.
            all_gather_object: gives every rank every rank's value.

        Raises:
            EPTopologyError: some ranks cannot reach each other by load and store.
            EPError: another rank has failed.
        """
        self._group = group
        self._communicator: Any = None
        borrowed = do_together(lambda: self._to_borrow(device, environment), all_gather_object)
        self._owned = not borrowed
        try:
            with torch.cuda.device(device):
                # nccl4py's object holds the bare pointer: letting go of it destroys nothing, in either version.
                if borrowed:
                    self._communicator = self._core.Communicator(borrowed)
                else:
                    self._create(all_gather_object)
            do_together(self._require_one_domain, all_gather_object)
        except BaseException:
            self.close(together=False)
            raise

    def _to_borrow(self, device: torch.device, environment: Environment) -> int:
        """The address of the group's communicator; 0 for one of our own."""
        self._core = import_cuda_extra("nccl.core")
        return _pointer_of(self._group, device) if environment.reuse_nccl_comm else 0

    def _create(self, all_gather_object: Callable[[Any, str], list[Any]]) -> None:
        def init() -> None:  # noted at once: where a peer fails, it is to be ended here too
            self._communicator = self._core.Communicator.init(self._group.size(), self._group.rank(), unique_id)

        is_first = self._group.rank() == 0
        mine = do_together(lambda: self._core.get_unique_id().as_bytes if is_first else None, all_gather_object)
        unique_id = self._core.UniqueId.from_bytes(all_gather_object(mine, "to make a communicator")[0])
        do_together(init, all_gather_object)

    def _require_one_domain(self) -> None:
        """Until there are kernels for the network, every rank must reach every other by load and store."""
        num_domains, num_ranks = int(self._communicator.n_lsa_teams), self._group.size()
        if num_domains > 1:
            # NCCL's load/store teams are equal runs of consecutive ranks.
            size = num_ranks // num_domains
            domains = ", ".join(f"{first} to {first + size - 1}" for first in range(0, num_ranks, size))
            raise EPTopologyError(
                f"the {num_ranks} ranks of the group are in {num_domains} NVLink domains (ranks {domains}); this "
                "version's kernels stay inside one: use a group per domain, and unset NCCL_LSA_TEAM_SIZE if it is set"
            )

    def register(self, memory: torch.Tensor) -> tuple[Any, tuple[int, ...]]:
        """Register symmetric memory. Collective.

        Args:
            memory: [bytes] uint8 from ``allocate``, of the same size on every rank.

        Returns:
            nccl4py's window, and the base address of every rank's memory as this GPU sees it.

        Raises:
            EPTopologyError: NCCL cannot map the peers' memory.
        """
        window = self._communicator.register_window(memory, flags=self._core.WindowFlag.COLL_SYMMETRIC)
        while int(self._communicator.get_async_error()) == IN_PROGRESS:
            time.sleep(0.001)
        # Where windows are not supported, 0.3.1.post1 returns None and 0.6.0 a window with a null handle.
        if window is None or not window.handle:
            raise EPTopologyError(
                "NCCL could not register symmetric memory (device API supported: "
                f"{self._communicator.device_api_support}); see NCCL_DEBUG=INFO, and check that NCCL_CUMEM_ENABLE and "
                "NCCL_WIN_ENABLE are not 0 and that `nvidia-smi topo -m` shows NVLink between all GPUs"
            )
        return window, tuple(int(window.get_lsa_device_pointer(rank)) for rank in range(self._group.size()))

    def deregister(self, window: Any) -> None:
        """Undo ``register``; where the communicator died with its group, NCCL has already done so."""
        if self.alive:
            window.close()

    @property
    def alive(self) -> bool:
        """Whether the communicator can still be used: a borrowed one dies with its group."""
        return self._communicator is not None and (self._owned or is_registered(self._group))

    def close(self, together: bool) -> None:
        """End the communicator if it is ours; a borrowed one belongs to its group. Idempotent.

        Args:
            together: all ranks do so now, and nothing has gone wrong. Else it is aborted: to destroy it is a step that
                the ranks of a host take together, and would wait for those that do not come.
        """
        communicator, self._communicator = self._communicator, None
        if communicator is not None and self._owned:
            if together:
                communicator.destroy()
            else:
                communicator.abort()


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed memory that NCCL can map into peers: [num_bytes, rounded up to pages] uint8, freed with the tensor."""
    memory = import_cuda_extra("nccl.core.interop.torch").empty(
        -(-num_bytes // WINDOW_GRANULARITY) * WINDOW_GRANULARITY, dtype=torch.uint8, device=device
    )
    memory.zero_()
    torch.cuda.synchronize(device)  # a peer's first store must not be overtaken by our zeros
    return memory  # type: ignore[no-any-return]


def warm_up(group: dist.ProcessGroup, device: torch.device) -> None:
    """Run one tiny collective: before its first one a lazy group's communicator is a null pointer. Collective.

    Raises:
        EPTopologyError: ranks share a GPU without being allowed to.
    """
    try:
        with torch.cuda.device(device):
            dist.all_reduce(torch.zeros(1, device=device), group=group)
            torch.cuda.synchronize(device)
    except dist.DistBackendError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise EPTopologyError(
            "several ranks share a GPU, which NCCL refuses: give every rank its own with torch.cuda.set_device(), "
            "or set NCCL_MULTI_RANK_GPU_ENABLE=1 on all ranks (correct, but slow)"
        ) from error


def is_registered(group: dist.ProcessGroup) -> bool:
    """Whether torch still knows the group: False after destroy_process_group()."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


def _pointer_of(group: dist.ProcessGroup, device: torch.device) -> int:
    """The address of the warm group's ncclComm_t; 0 where torch does not tell."""
    backend: Any = group._get_backend(device)
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL puts a checking one in front
    if not hasattr(backend, "_comm_ptr"):
        logger.warning("this torch does not hand out its NCCL communicator; deep_ep makes one of its own")
        return 0
    with torch.cuda.device(device):
        pointer = int(backend._comm_ptr())
    if not pointer:
        raise EPError(f"the group's NCCL communicator on {device} is null; set EP_REUSE_NCCL_COMM=0 to make another")
    return pointer
