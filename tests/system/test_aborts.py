"""Aborts of C++, in processes of their own."""

import subprocess
import sys

import pytest

ABORT = """
import os
from sdjax.system.aborts import abort_becomes
with abort_becomes(7, "said instead"{unless}):
    pass
with abort_becomes(76, "lost"{unless}):
    {inside}
os.abort()
"""


def run(inside, unless=""):
    script = ABORT.format(inside=inside, unless=unless)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return ran.returncode, ran.stderr


@pytest.mark.parametrize("unless", ["", ", lambda: False"])
def test_abort_in_the_context_is_a_message_and_an_exit_code(unless):
    assert run("os.abort()", unless) == (76, "lost\n")


def test_abort_that_is_let_through_aborts():
    assert run("os.abort()", ", lambda: True") == (-6, "")


def test_abort_after_the_context_aborts():
    assert run("pass") == (-6, "")
