"""Processor seconds of each test file, those of processes that it starts too, as a plugin.

SDJAX_TEST_CACHE= python -m pytest -p tests.cpu_seconds tests/train
"""

import collections
import os

import pytest

SECONDS = collections.Counter()
_last = 0.0


def used():
    """Processor seconds of this process, and of those it has waited for, so far."""
    return sum(os.times()[:4])


def pytest_runtest_logstart():
    global _last
    _last = used()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Note what setup, call or teardown took; xdist carries attributes of reports along."""
    global _last
    report = yield
    now = used()
    report.cpu_seconds, _last = now - _last, now
    return report


def pytest_runtest_logreport(report):
    SECONDS[report.nodeid.split("::")[0]] += getattr(report, "cpu_seconds", 0.0)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("processor seconds")
    for file, seconds in SECONDS.most_common():
        terminalreporter.write_line(f"{seconds:8.1f} {file}")
    terminalreporter.write_line(f"{sum(SECONDS.values()):8.1f} in all")
