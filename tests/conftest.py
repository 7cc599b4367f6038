"""What all tests share: GPU tests skip where there is no GPU, failures print their seeds, measurements come last."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from hypothesis import settings

# A run that fails once must fail again: draws do not depend on the day, and a slow machine is no failure.
settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("house")

MEASURED = "measured"  # record_property("measured", line): shown after the run, also of tests that pass


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Print what a failing test recorded with ``record_property("seed", ...)``, and the command that runs it again."""
    report = yield
    drawn = [f"{name} = {value}" for name, value in item.user_properties if name != MEASURED]
    if report.failed and drawn:
        report.sections.append(("replay", "\n".join([*drawn, f"python -m pytest '{item.nodeid}'"])))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    lines = [str(value) for report in reports for name, value in report.user_properties if name == MEASURED]
    if lines:
        terminalreporter.section(MEASURED)
        for line in sorted(set(lines)):
            terminalreporter.line(line)
