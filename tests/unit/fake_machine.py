"""A machine that launches nothing, and a buffer of one rank on it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deep_ep
from deep_ep import ElasticBuffer
from deep_ep.calls.agreement import Statement
from deep_ep.errors import EPError
from deep_ep.ops.arguments import FaultRecord
from deep_ep.ops.faults import READABLE

HIDDEN = 64


class FakeMemory:
    """A window, or words for the host."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.tensor = torch.zeros(num_bytes // 4 if num_bytes < 1 << 16 else 0, dtype=torch.int32)
        self.address = self.tensor.data_ptr()
        self.addresses = (0x1000,)
        self.closed = False

    def part(self, offset: int, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def close(self) -> None:
        self.closed = True


class FakeMachine:
    """One rank. ``on_launch`` stands for the kernel."""

    name, device, comm_stream = "simulated", torch.device("cpu"), None
    num_sms, shared_bytes_per_block = 4, 232448
    wire_gbs: float | None = None
    memory_gbs: float | None = None
    gone: Mapping[int, str] = {}
    launches_finish = False

    def __init__(self) -> None:
        self.launches: list[tuple[str, int, int]] = []  # kernel, blocks, of which send
        self.on_launch: Callable[[], None] = lambda: None
        self.prepared: list[str] = []
        self.words: list[FakeMemory] = []
        self.num_meetings = self.num_closed = 0
        self.closed_together: bool | None = None
        self.steps: list[str] = []  # of its end, in order
        self.prepare_fails = False
        self.capture = 0
        self.answers: list[str | None] | None = None  # of all ranks, in a step that they end together

    def prepare(self, kernels: Any) -> None:
        self.prepared = [kernel.name for kernel in kernels]
        if self.prepare_fails:
            raise EPError("does not compile")

    def allocate_window(self, num_bytes: int) -> FakeMemory:
        self.window = FakeMemory(num_bytes)
        return self.window

    def host_words(self, count: int) -> FakeMemory:
        self.words.append(FakeMemory(4 * count))
        return self.words[-1]

    def launch(self, kernel: Any, args: Any, *, num_blocks: int, **_: Any) -> None:
        self.launches.append((kernel.name, num_blocks, getattr(args, "num_send_blocks", 0)))
        self.on_launch()

    def current_capture(self) -> int:
        return self.capture

    def all_gather_object(self, value: Any, what: str, limit_s: float | None = None) -> list[Any]:
        if what == "to destroy a buffer":
            self.num_meetings += 1
            self.meeting_limit_s = limit_s
            self.steps.append("meet")
            return [value]
        return self.answers or [value]

    def close(self, *, together: bool = False) -> None:
        self.num_closed += 1
        self.closed_together = together
        self.steps.append("close")
        if hasattr(self, "window"):
            self.window.close()

    def leave_fault(self, record: int = 0) -> None:
        """What a kernel writes whose wait has timed out; or as a notice, whose wait takes long."""
        fault = FaultRecord(state=READABLE, phase=3, peer=1, waited_ns=2_000_000_000)
        address = self.words[-2].address + record * ctypes.sizeof(fault)
        ctypes.memmove(address, ctypes.addressof(fault), ctypes.sizeof(fault))

    def report_counts(self, rows: int, *selections: int) -> None:
        self.words[1].tensor[: 2 + len(selections)] = torch.tensor([1, rows, *selections])


def build(**settings: Any) -> ElasticBuffer:
    group = dist.group.WORLD
    assert group is not None
    return ElasticBuffer(group, num_max_tokens_per_rank=8, hidden=HIDDEN, num_topk=2, **settings)


def dispatch(buffer: ElasticBuffer, **changes: Any) -> deep_ep.EPHandle:
    idx = torch.zeros(3, 1, dtype=deep_ep.topk_idx_t)
    x = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
    return buffer.dispatch(x, topk_idx=idx, num_experts=4, **changes)[3]


def others_differ(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """There is a second rank, which builds the same but for this."""

    def gather(value: Any, what: str) -> list[Any]:
        return [value, replace(value, **changes) if isinstance(value, Statement) else value]

    monkeypatch.setattr(machine, "all_gather_object", gather)
