"""Who this process is, from flags and from what launchers set; what an error of a host means."""

import socket
import subprocess
import sys

import pytest

from sdjax.errors import UserError
from sdjax.parallel.distributed import JoinError, Place, check_port, find_place, first_node
from sdjax.parallel.hosts import means_lost_host

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09,20]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "PMIX_NAMESPACE": "prterun-node-42@1",
}


def find(env=(), coordinator="", num_processes=0, process_id=-1, cluster="auto"):
    env = {"JAX_PLATFORMS": "cpu"} | dict(env)
    return find_place(coordinator, num_processes, process_id, cluster, env, 1.0)


def test_nothing_said_is_one_process():
    assert find() is None
    assert find(cluster="none", env=SLURM) is None
    alone = SLURM | {"SLURM_STEP_NUM_TASKS": "1"}
    assert find(alone) is None
    batch_script = {k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_NTASKS": "4"}
    assert find(batch_script) is None
    assert find(coordinator="a:1", num_processes=1, process_id=0) is None


def test_flags():
    place = find(coordinator="10.0.0.2:8476", num_processes=2, process_id=1)
    assert (place.coordinator, place.num_processes, place.process_id) == ("10.0.0.2:8476", 2, 1)
    assert place.local_device is None
    mixed = find(MPI, coordinator="node0:7000")  # the launcher counts, the flag says where
    assert (mixed.coordinator, mixed.num_processes, mixed.process_id) == ("node0:7000", 4, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_processes": 2}, "--coordinator=HOST:PORT and --process_id=I missing"),
        ({"process_id": 0}, "--coordinator=HOST:PORT and --num_processes=N missing"),
        ({"coordinator": "a:1"}, "--num_processes=N and --process_id=I missing"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "expected 0 to 1"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 1}, "expected HOST:PORT"),
        ({"coordinator": "a:0", "num_processes": 2, "process_id": 1}, "expected HOST:PORT"),
        ({"coordinator": "a:65536", "num_processes": 2, "process_id": 1}, "expected HOST:PORT"),
        ({"cluster": "none", "num_processes": 2}, "--cluster=none is one process"),
        ({"cluster": "slurm"}, "not started by srun"),
        ({"cluster": "mpi"}, "not started by mpirun"),
        ({"cluster": "tpu"}, "not a worker of a Cloud TPU slice"),
        ({"cluster": "k8s"}, "expected one of auto, none"),
        ({"cluster": "slurm", "env": SLURM, "num_processes": 4}, "leave out --num_processes"),
        ({"env": SLURM | {"SLURM_PROCID": "x"}}, "SLURM_PROCID is 'x'"),
    ],
)
def test_what_does_not_fit_together_is_named(options, words):
    with pytest.raises(JoinError, match=words):
        find(**options)


def test_slurm_tasks_agree_on_the_first_node_and_a_port():
    places = [find(SLURM | {"SLURM_PROCID": str(i)}) for i in range(4)]
    assert {p.coordinator for p in places} == {places[0].coordinator}
    host, port = places[0].coordinator.split(":")
    assert host == "gpu07" and 61440 <= int(port) < 65536
    assert [p.process_id for p in places] == [0, 1, 2, 3]
    assert {p.num_processes for p in places} == {4}
    assert find(SLURM | {"SLURM_STEP_ID": "3"}).coordinator != places[0].coordinator


def test_a_task_alone_on_its_node_keeps_all_gpus_others_take_one():
    assert find(SLURM).local_device is None
    two_a_node = SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}
    assert find(two_a_node).local_device == 1
    assert find(two_a_node | {"CUDA_VISIBLE_DEVICES": "0,1"}).local_device == 1
    assert find(two_a_node | {"CUDA_VISIBLE_DEVICES": "1"}).local_device is None  # bound by SLURM


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,other", "node001"),
        ("gpu[007-015,20],login", "gpu007"),
        ("gpu[3,5]", "gpu3"),
        ("rack[2-3]-n[10-12],x", "rack2-n10"),
        ("a-b.c[1-2].d", "a-b.c1.d"),
    ],
)
def test_first_node(nodes, first):
    assert first_node(nodes) == first


def test_open_mpi_on_one_machine_and_on_several():
    places = [find(MPI | {"OMPI_COMM_WORLD_RANK": str(i)}) for i in range(4)]
    assert {p.coordinator for p in places} == {places[0].coordinator}
    assert places[0].coordinator.startswith("127.0.0.1:")
    assert [p.process_id for p in places] == [0, 1, 2, 3]
    assert places[1].local_device == 2
    spread = MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(JoinError, match="HOST_OF_RANK_0"):
        find(spread)
    assert find(spread, coordinator="n0:7000").num_processes == 4
    assert find(spread, coordinator="n0:7000", cluster="mpi").process_id == 2


def test_ranks_whose_daemon_srun_started_are_open_mpis():
    daemon = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "1"}
    place = find(daemon | MPI)
    assert (place.source, place.num_processes, place.process_id) == ("Open MPI", 4, 2)
    assert find(daemon | MPI, cluster="slurm").process_id == 1


def test_tpu_workers_of_two_slices(monkeypatch):
    """As GKE sets them; the chips themselves are not asked."""
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    env = {
        "TPU_WORKER_HOSTNAMES": "localhost,worker1",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    }
    monkeypatch.delenv("TPU_PROCESS_ADDRESSES", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    place = find({"JAX_PLATFORMS": "tpu"})
    assert (place.source, place.num_processes, place.process_id) == ("Cloud TPU", 4, 3)
    assert place.coordinator == "localhost:8482"
    assert find() is None  # JAX_PLATFORMS=cpu: asked to run on something else
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "no-such-host.invalid")
    with pytest.raises(JoinError, match="cannot be found"):
        find({"JAX_PLATFORMS": "tpu"})


def test_which_errors_mean_a_lost_host():
    gloo = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:7559")
    assert means_lost_host(gloo)
    try:
        raise UserError("the checkpoint could not be written") from gloo
    except UserError as error:
        assert means_lost_host(error)
    assert not means_lost_host(UserError("gloo is not a sampler"))
    assert not means_lost_host(ConnectionResetError("Connection reset by peer"))  # a download
    assert not means_lost_host(RuntimeError("RESOURCE_EXHAUSTED: out of memory"))


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("option", [None, socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_a_coordinator_port_that_is_taken_is_named(address, option):
    with socket.socket() as server:
        if option is not None:
            server.setsockopt(socket.SOL_SOCKET, option, 1)
        server.bind((address, 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(JoinError, match=f"cannot open port {port} .*Address already in use"):
            check_port(Place("flags", f"localhost:{port}", 2, 0))
    check_port(Place("flags", f"localhost:{port}", 2, 0))


def test_a_port_of_connections_that_are_still_closing_is_free():
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the server closes first, so its side stays in TIME_WAIT
        client.close()
    check_port(Place("flags", f"localhost:{port}", 2, 0))


def test_process_0_of_a_taken_port_ends_with_a_message_and_no_crash():
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        code = (
            "from sdjax.parallel import distributed\n"
            f"distributed.join('localhost:{port}', 2, 0, timeout=30, heartbeat_timeout=30)"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1 and f"cannot open port {port}" in ran.stderr
