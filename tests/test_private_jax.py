"""Private functions of JAX that sdjax calls: each has a test that says where it is used.

Nobody promises them. Where one fails with a new version of JAX, the rest of sdjax works.
"""

import ast
import importlib
import inspect
from pathlib import Path

import jax
import pytest

from sdjax.train.monitoring.model_flops import loop_arguments

PACKAGE = Path(__file__).parents[1] / "sdjax"
DISTRIBUTED = "jax._src.distributed"
CLUSTERS = "jax._src.clusters.cloud_tpu_cluster"
CUDNN = "jax._src.cudnn.fused_attention_stablehlo"
TPU = ("is_env_present", "get_process_count", "get_process_id", "get_coordinator_address")
# (module, names after one another, positional arguments it is called with, keywords, who calls it)
CALLED = [
    *((CLUSTERS, f"{kind}.{name}", 0, (), "parallel/distributed.py") for name in TPU[:3]
      for kind in ("GkeTpuCluster", "GceTpuCluster")),
    *((CLUSTERS, f"{kind}.{TPU[3]}", 0, ("timeout_secs", "override_coordinator_port"),
       "parallel/distributed.py") for kind in ("GkeTpuCluster", "GceTpuCluster")),
    (CUDNN, "check_cudnn_version", 0, (), "parallel/gpus.py"),
    (CUDNN, "check_compute_capability", 1, (), "parallel/gpus.py"),
    (CUDNN, "is_cuda_compute_capability_equal", 1, (), "parallel/gpus.py"),
]  # fmt: skip
# Of the client that joins processes, which is C++ and has no signatures.
CLIENT = ("key_value_set", "blocking_key_value_get", "key_value_try_get", "key_value_dir_get",
          "wait_at_barrier")  # fmt: skip


def moved(what, user):
    """The message of a test that fails."""
    return (
        f"jax {jax.__version__} has {what} no more as it was: sdjax/{user} uses it. Find what "
        "takes its place, or bound jax in pyproject.toml"
    )


def find(module, names, user):
    """`module.names`, or the test fails with a message."""
    try:
        found = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        pytest.fail(moved(f"{module}.{names} ({error})", user))
    return found


@pytest.mark.parametrize(("module", "names", "count", "keywords", "user"), CALLED)
def test_private_function_is_there_and_takes_what_it_is_given(module, names, count, keywords, user):
    function = find(module, names, user)
    try:
        inspect.signature(function).bind(*[None] * count, **dict.fromkeys(keywords))
    except TypeError as error:
        pytest.fail(moved(f"{module}.{names}{inspect.signature(function)} ({error})", user))


def test_client_of_the_processes_is_there_with_its_methods():
    state = find(DISTRIBUTED, "global_state", "parallel/distributed.py")
    if not hasattr(state, "client"):
        pytest.fail(moved(f"{DISTRIBUTED}.global_state.client", "parallel/distributed.py"))
    client = find("jax._src.lib", "_jax.DistributedRuntimeClient", "parallel/hosts.py")
    missing = [name for name in CLIENT if not hasattr(client, name)]
    if missing:
        pytest.fail(moved(f"the methods {missing} of the client", "parallel/hosts.py"))


def test_lowering_for_gpus_replaces_every_question_about_this_machine():
    """A new question would be asked of a GPU that is not there."""
    module = importlib.import_module(CUDNN)
    asked = {name for name in vars(module) if name.startswith(("check_c", "is_cuda"))}
    replaced = {names for where, names, *_ in CALLED if where == CUDNN}
    if asked - replaced:
        pytest.fail(moved(f"only {sorted(replaced)}, but also {sorted(asked - replaced)}, as what "
                          "cuDNN's attention asks", "parallel/gpus.py"))  # fmt: skip


def test_loop_says_how_many_arguments_it_carries():
    def loop(kept, carried, many):
        return jax.lax.scan(lambda carry, one: (kept @ carry, one + 1), carried, many)

    square, many = jax.numpy.ones((4, 4)), jax.numpy.ones((3, 2))
    (found,) = jax.make_jaxpr(loop)(square, square, many).eqns
    try:
        counts = loop_arguments(found.params)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        pytest.fail(moved(f"the parameters of a scan ({error!r})", "train/model_flops.py"))
    assert counts == (1, 1)


def test_every_private_module_in_use_is_looked_at_here():
    used = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used |= {f"{node.module}.{alias.name}" for alias in node.names}
    private = {name for name in used if name.startswith("jax") and "._" in name}
    assert private == {DISTRIBUTED, CLUSTERS, CUDNN}
