"""What hosts say through the store of the coordination service, with a dict in its place."""

import time

import jax
import pytest

from sdjax.parallel import hosts


class Store(dict):
    """Keys as the client of JAX's coordination service sets and gets them."""

    def key_value_set(self, key, value, overwrite=False):
        if key in self and not overwrite:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
        self[key] = value

    def key_value_try_get(self, key):
        if key not in self:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self[key]


@pytest.fixture
def monitor(monkeypatch):
    monitor = hosts.HostMonitor(Store(), "localhost:1", 60.0)
    monkeypatch.setattr(hosts, "_monitor", monitor)
    return monitor


def test_process_alone_stops_after_the_step_it_was_asked_in():
    assert hosts.alone()
    assert hosts.stops_after(3, asked=True) and not hosts.stops_after(3, asked=False)


@pytest.mark.parametrize("ahead", [-2, -1, 0, 1, 2])  # as far as metrics let hosts be apart
@pytest.mark.parametrize("both", [False, True])
def test_hosts_stop_after_the_same_step_whoever_is_ahead(monitor, ahead, both):
    asked = 10
    other = asked + ahead
    assert not any(hosts.stops_after(step, asked=False) for step in range(1, other + 1))
    stopped = {}
    for step in range(asked, asked + 9):
        if hosts.stops_after(step, asked=True):
            stopped["asked"] = step
            break
    for step in range(other + 1, other + 9):
        if hosts.stops_after(step, asked=both):
            stopped["other"] = step
            break
    assert stopped == {"asked": asked + hosts.STOP_AHEAD, "other": asked + hosts.STOP_AHEAD}


def test_store_that_does_not_answer_is_an_error(monitor):
    def lost(*_):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")

    monitor.client.key_value_try_get = monitor.client.key_value_set = lost
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
        hosts.stops_after(1, asked=False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
        hosts.stops_after(1, asked=True)


def guarded(monitor, monkeypatch, turns):
    """How `_guard` ends after these turns: whether process 0 answered, and how long each took."""
    now, script, ended = [time.monotonic()], iter(turns), []

    def wait(_):
        answered, seconds = next(script, (None, 0))
        now[0] += seconds
        monitor._answers += bool(answered)
        return answered is None or bool(ended)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(monitor._over, "wait", wait)
    monkeypatch.setattr(monitor, "_exit", lambda code, message: ended.append((code, message)))
    monitor._guard()
    return ended


def test_process_0_that_answers_no_more_ends_the_others(monitor, monkeypatch):
    assert guarded(monitor, monkeypatch, [(False, 1)] * 59 + [(True, 1)] + [(False, 1)] * 60) == []
    ((code, message),) = guarded(monitor, monkeypatch, [(True, 1)] + [(False, 1)] * 61)
    assert code == 76 and "host 0 (localhost:1) is lost" in message


def test_process_that_stood_still_itself_does_not_call_process_0_lost(monitor, monkeypatch):
    assert guarded(monitor, monkeypatch, [(True, 1), (False, 300), (True, 1), (False, 1)]) == []
