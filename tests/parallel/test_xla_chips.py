"""What XLA is told of the step is compiled for TPUs that are not here."""

import subprocess
import sys

import pytest

# A sum over devices compiled with the options of the step, in a process that has no other devices.
COMPILED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from sdjax.parallel import xla
from sdjax.planning import topologies

devices = topologies.devices(topologies.parse(sys.argv[1]))
mesh = jax.sharding.Mesh(np.array(devices), "data")
x = jax.ShapeDtypeStruct((8, 256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
w = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=NamedSharding(mesh, P()))
loss = lambda w, x: jnp.sum((x @ w) ** 2)
step = jax.jit(lambda w, x: w - jax.grad(loss)(w, x), out_shardings=NamedSharding(mesh, P()))
text = step.lower(w, x).compile(compiler_options=xla.compiler_options(mesh)).as_text()
print("all-reduce" * ("all-reduce" in text))
"""


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_compiler_of_each_chip_takes_its_options(topology):
    """libtpu 0.0.50 refuses some that 0.0.42 took."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-c", COMPILED, topology]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["all-reduce"], run.stderr[-2000:]
