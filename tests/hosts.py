"""Several real processes of `sdjax.main` on this machine, for tests of more than one host."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from sdjax.config import resolve, to_dict
from tests.conftest import XLA_FLAGS

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def write_recipe(file, config):
    """A recipe file with the values of a ConfigDict; gives `file`."""
    values = to_dict(resolve(config))
    variants = f"family={values['model']['family']!r}, method={values['method']['name']!r}"
    file.write_text(
        f"from sdjax.config import default\n\n\ndef get_config():\n    c = default({variants})\n"
        f"    c.update({values!r})\n    return c\n"
    )
    return file


def start_host(recipe, workdir, *options, devices=1, env=()):
    """One process; its output goes to files, so that none waits for a reader."""
    log = Path(f"{workdir}.{time.monotonic_ns()}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    # Tests compare runs of equal flags.
    xla = f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}"
    with log.open("wb") as out, log.with_suffix(".err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "sdjax.main", f"--config={recipe}",
             f"--workdir={workdir}", *options],
            cwd=ROOT, stdout=out, stderr=err,
            env=os.environ | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu", **dict(env)},
        )  # fmt: skip
    return Host(process, log)


@dataclasses.dataclass
class Host:
    """A process under way."""

    process: subprocess.Popen
    log: Path

    @property
    def out(self):
        return self.log.read_text()

    @property
    def err(self):
        return self.log.with_suffix(".err").read_text()

    def wait(self, timeout=240):
        """Its exit code; killed after `timeout`."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running after {timeout} s:\n{self.err[-3000:]}") from None

    def wait_for(self, pattern, timeout=240):
        """Until its output matches."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.out):
            assert self.process.poll() is None, f"ended before {pattern!r}:\n{self.err[-3000:]}"
            assert time.monotonic() < deadline, (
                f"no {pattern!r} in {timeout} s:\n{self.err[-3000:]}"
            )
            time.sleep(0.05)

    def send(self, name):
        """A signal: "KILL", "TERM"."""
        self.process.send_signal(signal.Signals[f"SIG{name}"])


def start_hosts(recipe, workdir, count, *options, total_devices=4, timeouts=(120, 10)):
    """`count` processes with `total_devices` devices among them."""
    coordinator, devices = f"127.0.0.1:{free_port()}", total_devices // count
    if count == 1:
        return [start_host(recipe, workdir, *options, devices=devices)]
    return [
        start_host(
            recipe, workdir, f"--coordinator={coordinator}", f"--num_processes={count}",
            f"--process_id={i}", f"--join_timeout={timeouts[0]}",
            f"--heartbeat_timeout={timeouts[1]}", *options, devices=devices,
        )
        for i in range(count)
    ]  # fmt: skip


def run_hosts(recipe, workdir, count, *options, **kwargs):
    """Start them, wait, and give their exit codes and the processes."""
    hosts = start_hosts(recipe, workdir, count, *options, **kwargs)
    return [host.wait() for host in hosts], hosts


def losses(workdir):
    """{step: training loss} of a run."""
    lines = (json.loads(x) for x in (Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}
