"""NCCL's versions and topology, without NCCL: maps, headers and communicators are made up."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_ep.environment import Environment
from deep_ep.errors import EPEnvironmentError, EPError, EPTimeoutError, EPTopologyError
from deep_ep.machine import nccl

LIBRARY = nccl.Library(Path("/site/nvidia/nccl/lib/libnccl.so.2"), (2, 30, 7))
HEADER = '#define NCCL_MAJOR {}\n#define NCCL_MINOR {}\n#define NCCL_PATCH {}\n#define NCCL_SUFFIX ""\n'


def maps_with(folder: Path, *paths: str) -> Path:
    lines = [f"7f0000000000-7f0000001000 r-xp 00000000 08:01 1234   {path}\n" for path in paths for _ in range(2)]
    file = folder / "maps"
    file.write_text("7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0    [stack]\n" + "".join(lines))
    return file


@pytest.fixture
def version_2_30_7(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_version_of", lambda path: (2, 30, 7))


@pytest.mark.usefixtures("version_2_30_7")
@pytest.mark.parametrize("suffix", ["", " (deleted)"])
def test_the_one_library_is_found(tmp_path: Path, suffix: str) -> None:
    maps = maps_with(tmp_path, "/usr/lib/libc.so.6", f"{LIBRARY.path}{suffix}", "/site/nccl/ep/lib/libnccl_ep.so")
    assert nccl.loaded_library(maps) == LIBRARY


@pytest.mark.usefixtures("version_2_30_7")
def test_two_libraries_are_an_error_with_both_paths(tmp_path: Path) -> None:
    maps = maps_with(tmp_path, "/opt/other place/libnccl.so.2.32.3", str(LIBRARY.path))
    with pytest.raises(EPEnvironmentError) as caught:
        nccl.loaded_library(maps)
    assert "/opt/other place/libnccl.so.2.32.3" in str(caught.value)
    assert str(LIBRARY.path) in str(caught.value)
    assert "pip install" in str(caught.value)


def test_a_torch_with_nccl_built_in_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EPEnvironmentError, match="built in"):
        nccl.loaded_library(maps_with(tmp_path, "/usr/lib/libc.so.6"))


@pytest.mark.parametrize(("version", "nccl4py"), [((2, 30, 7), "0.3.1.post1"), ((2, 32, 3), "0.6.0")])
def test_known_pairs_are_accepted(version: nccl.Version, nccl4py: str) -> None:
    nccl._check_pair(nccl.Library(LIBRARY.path, version), nccl4py, Environment())


@pytest.mark.parametrize(
    ("version", "nccl4py", "line"),
    [
        ((2, 30, 7), "0.6.0", "pip install 'nvidia-nccl-cu13==2.30.7' 'nccl4py==0.3.1.post1'"),
        ((2, 32, 3), "0.3.1.post1", "pip install 'nvidia-nccl-cu13==2.32.3' 'nccl4py==0.6.0'"),
        ((2, 28, 9), "0.6.0", "pip install 'nvidia-nccl-cu13==2.30.7' 'nccl4py==0.3.1.post1'"),
        ((2, 30, 7), None, "pip install 'nvidia-nccl-cu13==2.30.7' 'nccl4py==0.3.1.post1'"),
    ],
)
def test_any_other_pair_is_an_error_with_both_versions_and_the_install_line(
    version: nccl.Version, nccl4py: str | None, line: str
) -> None:
    with pytest.raises(EPEnvironmentError) as caught:
        nccl._check_pair(nccl.Library(LIBRARY.path, version), nccl4py, Environment())
    assert line in str(caught.value)
    assert ".".join(map(str, version)) in str(caught.value)
    assert nccl4py is None or nccl4py in str(caught.value)


def test_the_check_can_be_made_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="deep_ep"):
        nccl._check_pair(LIBRARY, "0.6.0", Environment(suppress_nccl_check=True))
    assert "2.30.7" in caplog.text
    assert "0.6.0" in caplog.text


def test_headers_must_be_of_the_loaded_version(tmp_path: Path) -> None:
    header = tmp_path / "include" / "nccl.h"
    header.parent.mkdir()
    library = nccl.Library(tmp_path / "lib" / "libnccl.so.2", (2, 30, 7))
    nccl._check_headers(library, Environment())  # none beside the library: no kernel asked for them yet
    header.write_text(HEADER.format(2, 30, 7))
    nccl._check_headers(library, Environment())
    header.write_text(HEADER.format(2, 32, 3))
    with pytest.raises(EPEnvironmentError, match=r"nccl\.h is of NCCL 2\.32\.3, but NCCL 2\.30\.7 .* is loaded"):
        nccl._check_headers(library, Environment())
    header.write_text("nothing\n")
    with pytest.raises(EPEnvironmentError, match="states no NCCL_MAJOR"):
        nccl._check_headers(library, Environment())


def test_a_root_folder_without_headers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EPEnvironmentError, match=r"EP_NCCL_ROOT_DIR is .*, but there is no .*nccl\.h"):
        nccl._check_headers(LIBRARY, Environment(nccl_root_dir=tmp_path))


class FakeCommunicator:
    """What both versions of nccl4py have in common."""

    made: list[Any] = []

    def __init__(self, pointer: int, domains: int = 1, null_window: object = None) -> None:
        self.pointer, self.n_lsa_teams, self.null_window = pointer, domains, null_window
        self.device_api_support, self.destroyed, self.aborted, self.closed_windows = True, 0, 0, 0
        FakeCommunicator.made.append(self)

    @classmethod
    def init(cls, num_ranks: int, rank: int, unique_id: bytes) -> FakeCommunicator:
        assert (num_ranks, rank, unique_id) == (2, 1, b"the id of rank 0")
        return cls(0)

    def register_window(self, memory: torch.Tensor, flags: int) -> Any:
        assert flags == 1
        if self.null_window != "works":
            return self.null_window
        base = memory.data_ptr()
        return SimpleNamespace(
            handle=5, get_lsa_device_pointer=lambda rank: base + rank, close=lambda: self._count_closed()
        )

    def _count_closed(self) -> None:
        self.closed_windows += 1

    def get_async_error(self) -> int:
        return 0

    def destroy(self) -> None:
        self.destroyed += 1

    def abort(self) -> None:
        self.aborted += 1


@pytest.fixture
def fake_nccl4py(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    FakeCommunicator.made = []
    core = SimpleNamespace(
        Communicator=FakeCommunicator,
        UniqueId=SimpleNamespace(from_bytes=lambda data: data),
        WindowFlag=SimpleNamespace(COLL_SYMMETRIC=1),
    )
    monkeypatch.setattr(nccl, "import_cuda_extra", lambda module: core)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(nccl, "is_registered", lambda group: group.registered)
    return core


def fake_group(num_ranks: int = 2) -> Any:
    backend = SimpleNamespace(_comm_ptr=lambda: 0xC0)
    checking = SimpleNamespace(wrapped_pg=backend)  # as with TORCH_DISTRIBUTED_DEBUG=DETAIL
    return SimpleNamespace(
        rank=lambda: 1, size=lambda: num_ranks, registered=True, _get_backend=lambda device: checking
    )


def open_communicator(group: Any, **settings: Any) -> nccl.Communicator:
    def gather(value: Any, what: str) -> list[Any]:
        return [b"the id of rank 0" if what == "to make a communicator" else None, value]

    return nccl.Communicator(group, torch.device("cuda", 0), Environment(**settings), gather)


@pytest.mark.usefixtures("fake_nccl4py")
def test_the_groups_communicator_is_borrowed_and_left_alone() -> None:
    group = fake_group()
    communicator = open_communicator(group)
    (theirs,) = FakeCommunicator.made
    assert theirs.pointer == 0xC0
    theirs.null_window = "works"
    memory = torch.zeros(4, dtype=torch.uint8)
    window, addresses = communicator.register(memory)
    assert addresses == (memory.data_ptr(), memory.data_ptr() + 1)
    communicator.deregister(window)
    assert theirs.closed_windows == 1

    window, _ = communicator.register(memory)
    group.registered = False  # destroy_process_group(): the communicator is gone, and its windows with it
    communicator.deregister(window)
    assert theirs.closed_windows == 1
    communicator.close(together=True)
    communicator.close(together=False)
    assert (theirs.destroyed, theirs.aborted) == (0, 0)


@pytest.mark.usefixtures("fake_nccl4py")
def test_a_communicator_of_our_own_is_ended_once() -> None:
    """By a step that all ranks take together, where they do; else alone, waiting for nobody."""
    for together in (True, False):
        FakeCommunicator.made.clear()
        communicator = open_communicator(fake_group(), reuse_nccl_comm=False)
        (ours,) = FakeCommunicator.made
        communicator.close(together)
        communicator.close(together)
        assert (ours.destroyed, ours.aborted) == (int(together), int(not together))


@pytest.mark.parametrize("when", range(4))
def test_a_peer_that_fails_leaves_no_communicator(fake_nccl4py: SimpleNamespace, when: int) -> None:
    """Whatever it fails at: finding the library, naming the communicator, making it, or seeing who reaches whom."""

    def gather(value: Any, what: str) -> list[Any]:
        if what == "to make a communicator":
            return [b"the id of rank 0", value]
        steps.append(what)
        return ["RuntimeError: out of memory" if len(steps) == when + 1 else None, value]

    steps: list[str] = []
    with pytest.raises(EPError, match="rank 0 of the group cannot take part: RuntimeError: out of memory"):
        nccl.Communicator(fake_group(), torch.device("cuda", 0), Environment(reuse_nccl_comm=False), gather)
    assert [ours.aborted for ours in FakeCommunicator.made] == [1] * (when >= 2)


def test_what_fails_here_is_told(fake_nccl4py: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the peers do not come to hear it."""

    def gather(value: Any, what: str) -> list[Any]:
        if what == "to make a communicator":
            return [b"the id of rank 0", value]
        if value is None:
            return [None, None]
        told.append(value)
        raise EPTimeoutError("rank 1 waited 300 s for ranks [0]")

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    told: list[str] = []
    monkeypatch.setattr(FakeCommunicator, "__init__", fail)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        nccl.Communicator(fake_group(), torch.device("cuda", 0), Environment(reuse_nccl_comm=False), gather)
    assert told == ["RuntimeError: out of memory"]


@pytest.mark.parametrize("null_window", [None, SimpleNamespace(handle=0)], ids=["0.3.1.post1", "0.6.0"])
@pytest.mark.usefixtures("fake_nccl4py")
def test_memory_that_cannot_be_shared_is_an_error(null_window: object) -> None:
    communicator = open_communicator(fake_group())
    FakeCommunicator.made[0].null_window = null_window
    with pytest.raises(EPTopologyError, match="could not register symmetric memory"):
        communicator.register(torch.zeros(4, dtype=torch.uint8))


def test_ranks_of_several_domains_are_named(fake_nccl4py: SimpleNamespace) -> None:
    fake_nccl4py.Communicator = lambda pointer: FakeCommunicator(pointer, domains=2)
    with pytest.raises(EPTopologyError, match=r"8 ranks .* 2 NVLink domains \(ranks 0 to 3, 4 to 7\)"):
        open_communicator(fake_group(8))


def test_the_document_lists_the_pairs() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "environment.md").read_text()
    rows = re.findall(r"^\| (\d\S*) \| (\S+) \| `(pip install .*)` \|$", document, flags=re.MULTILINE)
    assert rows == [
        (nccl._text(version), ours, nccl._install_line(version)) for version, ours in nccl.NCCL4PY_OF_NCCL.items()
    ]
