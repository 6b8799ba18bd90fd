"""The layers that are compiled for TPU chips: FLOPs that are known, and one layer compiled."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sdjax.models.layers import linear

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tpu_layers  # noqa: E402


def tiny():
    """One dense layer of 256 x 256 over 1,024 rows, as it is and with its product twice."""
    graph, parameters = tpu_layers.module(partial(linear, 256, 256, bias=False))

    def run(params, x, times):
        layer = tpu_layers.nnx.merge(graph, params)
        return sum(layer(x * (i + 1)) for i in range(times))

    variants = {"once": partial(run, times=1), "twice": partial(run, times=2)}
    return tpu_layers.Layer("tiny", ((1024, 256),), parameters, variants)


def test_a_layer_compiled_for_a_chip_costs_what_its_products_do(tmp_path, monkeypatch, capsys):
    pytest.importorskip("libtpu")
    monkeypatch.setattr(tpu_layers, "layers", lambda: [tiny()])
    file = tmp_path / "layers.json"
    assert tpu_layers.main(["--batch=2", f"--json={file}"]) == 0
    assert "| tiny | twice |" in capsys.readouterr().out
    result = json.loads(file.read_text())
    once, twice = (result["rows"][f"tiny: {name}"] for name in ("once", "twice"))
    # The product, and one for each side a gradient flows to, for 2 x 1,024 rows.
    flops = 3 * 2 * 2048 * 256 * 256
    assert once["flops"] == twice["flops"] == flops
    assert once["kernels"] == 0
    # No faster than the chip, and no array moved more often than by each of the three products;
    # small ones stay on the chip.
    arrays = 2 * 2 * 2048 * 256 * 2 + 2 * 256 * 256 * 4
    assert 0 < once["hbm"] < 3 * arrays
    assert flops / 459e12 < once["seconds"] < 50 * flops / 459e12
    assert twice["seconds"] > once["seconds"]


def test_every_layer_has_variants_that_compute_the_same():
    """Of shapes alone: the values of kernels are tested where the kernels are."""
    found = tpu_layers.layers()
    assert len({layer.name for layer in found}) == len(found)
    for layer in found:
        arrays = [jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16) for shape in layer.arrays]
        if layer.name.startswith(("attention", "remat")):
            continue  # their dense variant is the same module
        shapes = {jax.eval_shape(run, layer.parameters, *arrays) for run in layer.variants.values()}
        assert len(shapes) == 1, layer.name


def test_a_word_in_no_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        tpu_layers.main(["--layers=nonsense"])
    assert "no layer is called so" in capsys.readouterr().err
