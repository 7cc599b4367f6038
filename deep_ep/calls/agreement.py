"""What the ranks of a buffer must have in common, compared when they build it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from deep_ep import jit, layout
from deep_ep.errors import EPError
from deep_ep.machine import Machine
from deep_ep.version import __version__

MOST_NUMBERS = 1 << 12  # of buffers, before they begin again (kEpochBits in include/deep_ep/wire/plan.cuh)

_num_built: dict[tuple[int, ...], int] = {}  # buffers of this process, by the ranks of their group


@dataclass(frozen=True)
class Settings:
    """Arguments of a buffer that are the same on all ranks, or calls would go wrong later."""

    num_bytes: int
    num_max_tokens_per_rank: int
    allow_multiple_reduction: bool
    num_topk: int | None = None  # if the window was sized by it
    num_registered_bytes: int = 0

    def num_label_bytes(self, num_ranks: int) -> int | None:
        """Of all labels that may come, if that is known."""
        if self.num_topk is None:
            return None
        return layout.labels_bytes(num_ranks, self.num_max_tokens_per_rank, self.num_topk or layout.MAX_TOPK)


@dataclass(frozen=True)
class Statement:
    """What one rank says of itself."""

    package: str  # its version
    headers: str  # a digest
    layout: str  # a digest of where the window's regions are
    settings: Settings
    num_built: int


def agree_to_build(
    machine: Machine, group_ranks: tuple[int, ...], settings: Settings, window_layout: layout.WindowLayout
) -> int:
    """Compare what the ranks are about to build. Collective.

    Returns:
        the buffer's number among those of these ranks, the same on all of them.

    Raises:
        EPError: ranks run different versions of this package.
        ValueError: their settings differ.
    """
    headers = jit.digest_of_headers(jit.INCLUDE_DIR)
    own = Statement(__version__, headers, window_layout.digest(), settings, _num_built.get(group_ranks, 0))
    said = machine.all_gather_object(own, "to compare their settings")
    _compare_versions(said, "package")
    _compare_versions(said, "headers")
    for field in dataclasses.fields(Settings):
        values = [getattr(other.settings, field.name) for other in said]
        for rank, value in enumerate(values):
            if value != values[0]:
                if field.name == "num_topk" and None in (value, values[0]):
                    raise ValueError("num_bytes must be given on all ranks or on none: labels get other room with it")
                raise ValueError(
                    f"{field.name} must be the same on all ranks, but it is {values[0]} on rank 0 and {value} on rank "
                    f"{rank} of the group; pass one value on all of them"
                )
    _compare_versions(said, "layout")  # it follows from the settings, within one version
    number = max(other.num_built for other in said)
    _num_built[group_ranks] = number + 1
    return number % MOST_NUMBERS


def _compare_versions(said: list[Statement], what: str) -> None:
    values = [getattr(other, what) for other in said]
    for rank, value in enumerate(values):
        if value != values[0]:
            raise EPError(
                f"ranks run different versions of deep_ep: rank 0 has {what} {values[0]}, rank {rank} {value}; install "
                "the same one for all of them"
            )
