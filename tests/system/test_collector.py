"""Garbage is left for later while a run starts, and collected again afterwards."""

import gc

import pytest

from sdjax.system import collector


def test_collector_is_paused_inside_and_as_before_outside():
    assert gc.isenabled()
    with pytest.raises(KeyError), collector.paused():
        with collector.paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with collector.paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
