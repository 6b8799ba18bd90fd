"""Processor seconds of each test file and of the costliest tests, as a plugin.

Those of processes that a test starts are counted, once it has waited for them.

SDJAX_TEST_CACHE= python -m pytest -p tests.cpu_seconds tests/train
"""

import collections
import os

import pytest

SECONDS = collections.Counter()
TESTS = collections.Counter()  # fixtures are the first test's that asks for them
SHOWN = 20
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
    seconds = getattr(report, "cpu_seconds", 0.0)
    SECONDS[report.nodeid.split("::")[0]] += seconds
    TESTS[report.nodeid] += seconds


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("processor seconds")
    for file, seconds in SECONDS.most_common():
        terminalreporter.write_line(f"{seconds:8.1f} {file}")
    terminalreporter.write_line(f"{sum(SECONDS.values()):8.1f} in all")
    terminalreporter.section("of the costliest tests")
    for test, seconds in TESTS.most_common(SHOWN):
        terminalreporter.write_line(f"{seconds:8.1f} {test}")
