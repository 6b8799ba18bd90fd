"""Programs that compute on the CPU ask the system for large pages."""

import os
import subprocess
import sys

import pytest

from sdjax.system import allocator

PROGRAM = """
import resource, sys
if "large" in sys.argv:
    from sdjax.system.allocator import use_large_pages
    use_large_pages()
import jax, jax.numpy as jnp
add = jax.jit(lambda x: x + 1)
x = jnp.zeros((16, 1024, 1024))  # 64 MiB
for _ in range(3):
    jax.block_until_ready(add(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    jax.block_until_ready(add(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, *sys.argv[1:])
"""


def run(*arguments):
    """Pages that the system provided for five results of 64 MiB, and the arguments that came."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for name in ("GLIBC_TUNABLES", allocator.STARTED):
        env.pop(name, None)
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    pages, *came = done.stdout.split()
    return int(pages), came


@pytest.fixture
def helps(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    if not allocator._would_help():
        pytest.skip("this system gives large pages to all programs, or to none")


def test_the_program_starts_again_as_it_was_and_gets_large_pages(helps):
    small = 5 * 64 * 2**20 // os.sysconf("SC_PAGESIZE")
    pages, came = run("large", "--option=1", "-x")
    assert pages < 0.1 * small
    assert came == ["large", "--option=1", "-x"]


def test_other_tunables_stay_and_a_wish_of_the_user_comes_first(helps, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *args: started.append(os.environ["GLIBC_TUNABLES"]))
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    env = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "JAX_PLATFORMS": "cpu"}
    monkeypatch.setattr(os, "environ", env)
    allocator.use_large_pages()
    assert started == []
    env["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=3"
    allocator.use_large_pages()
    assert started == ["glibc.malloc.tcache_count=3:glibc.malloc.hugetlb=1"]
    del env["GLIBC_TUNABLES"]  # as from a program that has privileges
    allocator.use_large_pages()
    assert len(started) == 1


@pytest.mark.parametrize(
    "where",
    ["another libc", "an old glibc", "pages for all", "no such pages", "a GPU", "a debugger"],
)
def test_where_it_would_not_help_nothing_is_started_again(where, monkeypatch, tmp_path):
    pages = tmp_path / "enabled"
    pages.write_text("[always] madvise never" if where == "pages for all" else "[madvise] never")
    missing = tmp_path / "missing"
    libc = {"another libc": ("", ""), "an old glibc": ("glibc", "2.31")}
    monkeypatch.setattr(allocator, "_PAGES", missing if where == "no such pages" else pages)
    monkeypatch.setattr("platform.libc_ver", lambda: libc.get(where, ("glibc", "2.41")))
    monkeypatch.setattr(allocator, "_ACCELERATORS", (str(pages),) if where == "a GPU" else ())
    monkeypatch.setattr(sys, "gettrace", lambda: print if where == "a debugger" else None)
    monkeypatch.setattr(os, "environ", {})
    started = []
    monkeypatch.setattr(os, "execv", lambda *args: started.append(args))
    allocator.use_large_pages()
    assert started == []
    monkeypatch.setattr(allocator, "_PAGES", pages)
    monkeypatch.setattr(allocator, "_ACCELERATORS", ())
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.41"))
    pages.write_text("always [madvise] never")
    allocator.use_large_pages()  # and all that was missing was that
    assert len(started) == 1
