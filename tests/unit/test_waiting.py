"""How the host waits: eagerly at first, with notices, and within its limit."""

from __future__ import annotations

import pytest

from deep_ep import waiting
from deep_ep.waiting import Watch, notice_seconds


class Clock:
    """Time passes while somebody sleeps, and a little at every look."""

    def __init__(self) -> None:
        self.now, self.pauses = 1000.0, list[float]()

    def monotonic(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += max(seconds, 1e-5)

    def select(self, *files_and_seconds: object) -> None:
        assert files_and_seconds == ((), (), (), 0)
        self.sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    monkeypatch.setattr(waiting, "select", clock)
    return clock


def wait(watch: Watch) -> None:
    while not watch.is_over:
        watch.pause()


def test_it_sleeps_for_a_small_part_of_what_it_has_waited(clock: Clock) -> None:
    wait(Watch(300))
    assert 300 < clock.now - 1000 < 301
    assert clock.pauses[0] == 0
    assert max(clock.pauses) <= waiting.LAZY_SECONDS
    passed = 0.0
    for pause in clock.pauses:
        assert pause <= max(1e-5, 0.02 * passed)
        passed += max(pause, 1e-5)


def test_it_gives_notice_before_it_gives_up_and_ever_less_often(clock: Clock) -> None:
    notices: list[float] = []
    wait(Watch(300, notices.append))
    assert [round(seconds) for seconds in notices] == [30, 60, 120, 240]
    notices.clear()
    wait(Watch(4, notices.append))
    assert [round(seconds, 1) for seconds in notices] == [1.0, 2.0, 4.0][: len(notices)]
    assert len(notices) >= 2


def test_notices_come_before_the_end() -> None:
    for limit_s in (1e-3, 1, 100, 1e6):
        assert 0 < notice_seconds(limit_s) < limit_s
