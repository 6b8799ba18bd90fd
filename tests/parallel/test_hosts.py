"""What hosts say through the store of the coordination service, with a dict in its place."""

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
