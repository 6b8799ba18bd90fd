"""Agreement of all hosts before they train together: on configuration, workdir and data.

Where it is not, hosts would wait for one another for ever, or write half a checkpoint each.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sdjax.checkpoints.checkpoint import latest_step
from sdjax.config import Config, to_dict
from sdjax.config_changes import compare_configs
from sdjax.errors import UserError
from sdjax.parallel import hosts
from sdjax.system import paths

# Where a host reads its data and keeps its cache, how many threads it has and where its numbers are
# read is its own matter.
OWN = ("compilation_cache", "data.data_dir", "data.path", "data.threads", "data.workers",
       "data.prefetch", "monitor.prometheus_host", "monitor.prometheus_port",
       "monitor.textfile")  # fmt: skip

_MARK = ".shared"
_PATIENCE = 10.0  # seconds; a network file system may show a new file late


def check_config(config: Config) -> None:
    """All hosts were started with the same configuration.

    Raises:
        UserError: on a host whose configuration is not process 0's, naming the fields.
    """
    mine = to_dict(config)
    first = json.loads(hosts.from_first("config", json.dumps(mine)))
    different = [d for d in compare_configs(first, mine) if d.field not in OWN]
    if different:
        lines = "\n  ".join(f"{d.field}: {d.saved!r} there, {d.current!r} here" for d in different)
        raise UserError(
            f"process 0 and process {jax.process_index()} have different configurations:\n  {lines}"
            "\nstart all of them with the same command and the same version of sdjax"
        )


def check_shared(folder: paths.Path) -> None:
    """All hosts see the same workdir, by a file that process 0 writes and the others look for.

    Raises:
        UserError: on a host that does not see it, or sees another newest checkpoint in it.
    """
    if hosts.alone():
        return
    mark, step = folder / _MARK, str(latest_step(folder))
    token = uuid.uuid4().hex
    if jax.process_index() == 0:
        paths.write_text(mark, token)
    token, first_step = hosts.from_first("token", token), hosts.from_first("step", step)
    if not _seen(mark, token):
        raise UserError(
            f"--workdir={folder}: process {jax.process_index()} does not see there what process 0 "
            "writes. It must be one folder for all hosts: on a shared disk (NFS, Lustre, "
            "Filestore) or gs://BUCKET/PATH"
        )
    if step != first_step:
        raise UserError(
            f"--workdir={folder}: the newest checkpoint is of step {first_step} on process 0 and "
            f"of step {step} on process {jax.process_index()}. A slow network file system may need "
            "a minute: run the same command again"
        )
    hosts.wait_for_all("workdir")
    if jax.process_index() == 0:
        mark.unlink()


def check_data(state: Mapping[str, Any], lines: Sequence[str]) -> None:
    """All hosts read the same datasets, as far as names, counts and buckets tell.

    Each finds the shape of every batch by itself, so with other pictures they would run different
    programs and wait for one another for ever.

    Args:
        state: of the iterator, see `BatchIterator.get_state`.
        lines: of its summary.

    Raises:
        UserError: on a host that reads something else than process 0, naming the differences.
    """
    mine = {**state, "summary": list(lines)}
    first = json.loads(hosts.from_first("data", json.dumps(mine)))
    different = compare_configs(first, mine)
    if different:
        listed = "\n  ".join(f"{d.field}: {d.saved!r} there, {d.current!r} here" for d in different)
        raise UserError(
            f"process 0 and process {jax.process_index()} read different data:\n  {listed}\n"
            "give all hosts the same files: a shared disk, gs://BUCKET/PATH, or copies with their "
            "times (rsync -a), for raw data that changed is imported anew"
        )


def _seen(mark: paths.Path, token: str) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if paths.exists(mark) and mark.read_text() == token:
            return True
        time.sleep(0.2)
    return False
