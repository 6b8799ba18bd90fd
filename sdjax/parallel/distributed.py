"""Joining the other hosts of a run: which of them this process is, and JAX's connection to them.

`join` either makes this process one of the expected number or raises; it never leaves it training
alone. What the hosts then say to one another is in `sdjax.parallel.hosts`. What JAX could do of
this by itself, and does worse, stands in `docs/notes/libraries.md`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import threading
import zlib
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import distributed as jax_distributed
from jax._src.clusters import cloud_tpu_cluster

from sdjax.errors import UserError
from sdjax.parallel import hosts
from sdjax.system.aborts import abort_becomes

CLUSTERS = ("auto", "none", "flags", "slurm", "mpi", "tpu")

# Linux hands out ports below 61000 by itself; a fixed choice above them is likely to be free.
_FIRST_PORT, _PORTS = 61440, 4096


class JoinError(UserError):
    """This process could not become one of the hosts of the run."""


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among the others.

    Attributes:
        source: who says so, for messages.
        coordinator: HOST:PORT of process 0.
        local_device: the only GPU that this process takes; None for all it sees.
    """

    source: str
    coordinator: str
    num_processes: int
    process_id: int
    local_device: int | None = None


def join(
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    *,
    cluster: str = "auto",
    timeout: float,
    heartbeat_timeout: float,
) -> None:
    """Join the other hosts, if there are any. Before anything touches a device.

    Args:
        coordinator: HOST:PORT of process 0; "" where the cluster says so itself.
        num_processes: how many there are; 0 where the cluster says so itself.
        process_id: which one this is; -1 where the cluster says so itself.
        cluster: one of `CLUSTERS`; "auto" takes flags if any is given, else Open MPI, SLURM or
            Cloud TPU if one of them has started more than one process.
        timeout: seconds to wait for the others.
        heartbeat_timeout: seconds after which a silent host counts as lost.

    Raises:
        JoinError: the place of this process is not known, or the others did not come.
    """
    if timeout <= 0 or heartbeat_timeout <= 0:
        raise JoinError(
            f"--join_timeout={timeout:g}, --heartbeat_timeout={heartbeat_timeout:g}: expected "
            "seconds above 0"
        )
    place = find_place(coordinator, num_processes, process_id, cluster, os.environ, timeout)
    if place is not None:
        if place.process_id == 0:
            check_port(place)
        client = _connect(place, timeout, heartbeat_timeout)
        hosts.start(client, place.coordinator, heartbeat_timeout)


# ---- which process this is ---------------------------------------------------------------------


def find_place(
    coordinator: str,
    num_processes: int,
    process_id: int,
    cluster: str,
    env: Mapping[str, str],
    timeout: float,
) -> Place | None:
    """Return the place of this process, None if it is the only one; arguments as `join` has them.

    Raises:
        JoinError: the flags, or they and the launcher, do not fit together.
    """
    if cluster not in CLUSTERS:
        raise JoinError(f"--cluster={cluster}: expected one of {', '.join(CLUSTERS)}")
    if coordinator:
        address = re.fullmatch(r".+:(\d{1,5})", coordinator)
        if address is None or not 0 < int(address[1]) < 65536:
            raise JoinError(f"--coordinator={coordinator}: expected HOST:PORT, as in 10.0.0.2:8476")
    counted = num_processes > 0 or process_id >= 0
    if cluster == "none":
        if coordinator or counted:
            raise JoinError("--cluster=none is one process; leave out the flags of several")
        return None
    # mpirun starts its daemons through srun, whose variables their ranks then have as well.
    launched = _mpi(env, coordinator) if cluster in ("auto", "mpi", "flags") else None
    if launched is None and cluster in ("auto", "slurm", "flags"):
        launched = _slurm(env, coordinator)
    if cluster == "flags" or (cluster == "auto" and (coordinator or counted)):
        return _flags(coordinator, num_processes, process_id, launched)
    if counted:
        raise JoinError(f"--cluster={cluster} counts the processes itself: leave out "
                        "--num_processes and --process_id, or use --cluster=flags")  # fmt: skip
    starter = {"slurm": "srun (SLURM_PROCID)", "mpi": "mpirun (OMPI_COMM_WORLD_RANK)"}
    if launched is None and cluster in starter:
        raise JoinError(
            f"--cluster={cluster}: this process was not started by {starter[cluster]} as one "
            "of several; start it so, or use --cluster=none for one process"
        )
    return launched or _tpu(env, timeout, coordinator, required=cluster == "tpu")


def _flags(
    coordinator: str, num_processes: int, process_id: int, launched: Place | None
) -> Place | None:
    """The place that flags give; a launcher fills in which process this is, and of how many."""
    if launched is not None and num_processes <= 0 and process_id < 0:
        num_processes, process_id = launched.num_processes, launched.process_id
    given = {
        "--coordinator=HOST:PORT": coordinator,
        "--num_processes=N": num_processes > 0,
        "--process_id=I": process_id >= 0,
    }
    if not all(given.values()):
        raise JoinError(
            f"{' and '.join(flag for flag in given if not given[flag])} missing: several processes "
            "need the address of process 0 (the same on all), how many they are, and which one "
            "each is, from 0"
        )
    if process_id >= num_processes:
        raise JoinError(
            f"--process_id={process_id} with --num_processes={num_processes}: expected "
            f"0 to {num_processes - 1}"
        )
    if num_processes == 1:
        return None
    device = launched.local_device if launched else None
    return Place("flags", coordinator, num_processes, process_id, device)


def _slurm(env: Mapping[str, str], coordinator: str) -> Place | None:
    """The place of a task that srun started as one of several.

    https://slurm.schedmd.com/srun.html, output environment variables.
    """
    nodes = env.get("SLURM_STEP_NODELIST")  # not set in a batch script outside of srun
    if not nodes or "SLURM_PROCID" not in env:
        return None
    count = _number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if count <= 1:
        return None
    job = _number(env, "SLURM_JOB_ID") + _number(env, "SLURM_STEP_ID", default=0)
    address = coordinator or f"{first_node(nodes)}:{_FIRST_PORT + job % _PORTS}"
    # A task alone on its node keeps all of the node's GPUs.
    shared = count > _number(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
    device = _own_gpu(env, _number(env, "SLURM_LOCALID", default=0)) if shared else None
    return Place("SLURM", address, count, _number(env, "SLURM_PROCID"), device)


def first_node(nodes: str) -> str:
    """Return the first host of a SLURM list: `gpu[007-015,20],login` -> `gpu007`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group()) if first else nodes


def _mpi(env: Mapping[str, str], coordinator: str) -> Place | None:
    """The place of a rank that Open MPI's mpirun started as one of several."""
    if "OMPI_COMM_WORLD_RANK" not in env or _number(env, "OMPI_COMM_WORLD_SIZE") <= 1:
        return None
    count = _number(env, "OMPI_COMM_WORLD_SIZE")
    local = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", default=count)
    if not coordinator and local < count:
        # Nothing tells a rank where rank 0 runs; mpirun's own host need not be it.
        raise JoinError(
            f"Open MPI started {count} ranks on several machines, and does not say where rank 0 "
            "is: add --coordinator=HOST_OF_RANK_0:PORT (any free port) to the command"
        )
    # One of these is the same on all ranks of a job, and another in the next job.
    names = ("PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri", "OMPI_MCA_ess_base_jobid")
    job = next((env[name] for name in names if name in env), "")
    address = coordinator or f"127.0.0.1:{_FIRST_PORT + zlib.crc32(job.encode()) % _PORTS}"
    device = _own_gpu(env, _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")) if local > 1 else None
    return Place("Open MPI", address, count, _number(env, "OMPI_COMM_WORLD_RANK"), device)


def _own_gpu(env: Mapping[str, str], local_id: int) -> int | None:
    """Return the GPU of one task among several of its node; None if the launcher has bound it."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    return None if visible and len(visible.split(",")) == 1 else local_id


def _number(env: Mapping[str, str], *names: str, default: int | None = None) -> int:
    """Return the first of these variables that is set."""
    name = next((name for name in names if env.get(name)), names[0])
    if not env.get(name) and default is not None:
        return default
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise JoinError(
            f"environment variable {name} is {env.get(name)!r}; expected a number from the "
            "launcher. Give --coordinator, --num_processes and --process_id instead"
        ) from None


def _tpu(
    env: Mapping[str, str], timeout: float, coordinator: str, *, required: bool
) -> Place | None:
    """The place of a worker of a TPU slice, as JAX finds it.

    It asks the environment (GKE) or the metadata server (Compute Engine). Several slices
    (Multislice) are one run: MEGASCALE_* count them.
    """
    if env.get("JAX_PLATFORMS", "").split(",")[0] not in ("", "tpu") and not required:
        return None  # it shall run on something else
    kinds = (cloud_tpu_cluster.GkeTpuCluster, cloud_tpu_cluster.GceTpuCluster)
    try:
        kind = next((kind for kind in kinds if kind.is_env_present()), None)
        if kind is None:
            if required:
                raise JoinError("--cluster=tpu: this machine is not a worker of a Cloud TPU slice "
                                "(no TPU chips, or no libtpu: pip install jax[tpu])")  # fmt: skip
            return None
        count, index = kind.get_process_count(), kind.get_process_id()
        if count == 1:
            return None
        address = coordinator or kind.get_coordinator_address(
            timeout_secs=int(timeout), override_coordinator_port=env.get("JAX_COORDINATOR_PORT")
        )
    except JoinError:
        raise
    except Exception as error:  # the metadata server, what it says, or the name of worker 0
        raise JoinError(
            f"this is a worker of a Cloud TPU slice, but the others cannot be found: {error}\n"
            "Is the metadata server within reach, and are all workers up? Or give the place by "
            "--coordinator, --num_processes and --process_id; --cluster=none trains on this "
            "machine alone, where its chips are a whole slice"
        ) from error
    return Place("Cloud TPU", address, count, index)


# ---- the connection ----------------------------------------------------------------------------


def check_port(place: Place) -> None:
    """Try the port of the coordinator, which process 0 is about to open.

    Where JAX cannot open the port it names neither port nor remedy, or ends with SIGSEGV. It
    also shares the port with any other server that sets SO_REUSEPORT, which then gets half of the
    connections.

    Raises:
        JoinError: another program has the port, or it needs rights that this process lacks.
    """
    port = int(place.coordinator.rsplit(":", 1)[1])
    port, both = int(place.coordinator.rsplit(":", 1)[1]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        # As JAX's server: every address, IPv4 through the IPv6 socket where there is IPv6.
        # Connections of an earlier run that are still closing do not count.
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise JoinError(
            f"--coordinator={place.coordinator} (from {place.source}): process 0 cannot open port "
            f"{port} on this machine ({os.strerror(error.errno or 0)}). Give all processes a free "
            f"port above 1023 (`ss -ltnp sport = :{port}` names the program that has this one)"
        ) from error


def _connect(place: Place, timeout: float, heartbeat_timeout: float) -> Any:
    """Call `jax.distributed.initialize` with a message for each failure; return JAX's client."""
    jax.config.update("jax_enable_preemption_service", False)  # see `hosts.stops_after`
    failure: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                place.coordinator,
                place.num_processes,
                place.process_id,
                local_device_ids=None if place.local_device is None else [place.local_device],
                cluster_detection_method="deactivate",
                # JAX's own limits abort the process; ours come first and say more.
                initialization_timeout=int(timeout) + 60,
                heartbeat_timeout_seconds=int(2 * heartbeat_timeout) + 60,
            )
            _check_count(place)
            jax.process_count()  # every host's devices are known to all; waits for them too
        except Exception as error:
            failure.append(error)

    what = (
        f"process {place.process_id} of {place.num_processes} (from {place.source}) could not join "
        f"the others at {place.coordinator}"
    )
    with abort_becomes(2, f"[host {place.process_id}] error: {what}: see the line before. Do all "
                       "processes have the same number and address, and each an id of its "
                       "own?"):  # fmt: skip
        thread = threading.Thread(target=initialize, daemon=True)
        thread.start()
        thread.join(timeout)
        late = thread.is_alive()
    if late:
        raise JoinError(_late_message(place, what, timeout))
    if failure and isinstance(failure[0], JoinError):
        raise failure[0]
    if failure:
        raise JoinError(
            f"{what}: {failure[0]}\nIs the port free on the machine of process 0, and was jax not "
            "used before joining?"
        ) from failure[0]
    if jax.process_count() != place.num_processes or jax.process_index() != place.process_id:
        raise JoinError(
            f"{what}: JAX sees {jax.process_count()} process(es) and is number "
            f"{jax.process_index()}. Is JAX_PLATFORMS the same everywhere, and the accelerator in "
            "reach of every process?"
        )
    return jax_distributed.global_state.client


def _check_count(place: Place) -> None:
    """Check that process 0 has the same number of processes; JAX goes on, or waits in vain."""
    client: Any = jax_distributed.global_state.client
    if place.process_id == 0:
        client.key_value_set("sdjax/count", str(place.num_processes))
        return
    first = client.blocking_key_value_get("sdjax/count", 60_000)
    if first != str(place.num_processes):
        raise JoinError(
            f"process {place.process_id} was told of {place.num_processes} processes, process 0 of "
            f"{first} (from {place.source}): give all the same number"
        )


def _late_message(place: Place, what: str, timeout: float) -> str:
    host, port = place.coordinator.rsplit(":", 1)
    if place.process_id == 0:
        look = (
            f"This is process 0: were the other {place.num_processes - 1} started with the same "
            f"--coordinator and number, and can they reach port {port} of this machine (firewall, "
            f"network interface, {host} is its address as they see it)?"
        )
    else:
        look = (
            f"Is process 0 running on {host}, can this machine reach its port {port} (firewall, "
            f"DNS: try `nc -vz {host} {port}`), and were all {place.num_processes} started?"
        )
    return (
        f"{what} within {timeout:g} s.\n{look}\n"
        "Slow schedulers need a larger --join_timeout; --cluster=none trains on this host alone"
    )
