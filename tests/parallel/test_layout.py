"""Meshes, slices, and which host reads what: on device descriptions, no devices needed."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from sdjax.errors import UserError
from sdjax.parallel.batches import global_batch, positions, shares
from sdjax.parallel.mesh import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "imaginary"
    coords: tuple = (0, 0, 0)


def devices(count, per_host, **kw):
    return [Device(i, i // per_host, **kw) for i in range(count)]


def layout(config, found, monkeypatch):
    """The grid of devices that `make_mesh` hands to `Mesh`, which takes real devices only."""
    from sdjax.parallel import mesh as module

    monkeypatch.setattr(module, "Mesh", lambda grid, axes, axis_types: grid)
    return make_mesh(config, found)


def fake_mesh(hosts):
    """A mesh whose devices belong to these hosts: nested lists [data][fsdp][tensor]."""
    grid = np.vectorize(lambda h: Device(0, int(h)), otypes=[object])(np.array(hosts))
    shape = dict(zip(("data", "fsdp", "tensor"), grid.shape, strict=True))
    return types.SimpleNamespace(devices=grid, shape=shape)


@pytest.mark.parametrize(
    "config,count,message",
    [
        (dict(data=3), 8, "mesh data=3 x fsdp=1 x tensor=1 does not fit 8 devices"),
        (dict(fsdp=3), 8, "data=-1 x fsdp=3"),
        (dict(data=2, fsdp=2, slices=4), 4, "mesh.data = 2.*multiple of 4"),
        (dict(fsdp=8, slices=2), 8, "mesh.data = 1.*multiple of 2"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_would(config, count, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        layout(MeshConfig(**config), devices(count, 4), monkeypatch)


@pytest.mark.parametrize("field,value", [("data", 0), ("fsdp", -2), ("slices", -1)])
def test_sizes_out_of_range(field, value):
    with pytest.raises(UserError, match=f"mesh.{field} is {value}"):
        MeshConfig(**{field: value})


def test_only_data_crosses_groups_of_hosts(monkeypatch):
    found = devices(16, 4)[::-1]  # in whatever order
    grid = layout(MeshConfig(data=-1, fsdp=4, tensor=2, slices=2), found, monkeypatch)
    assert grid.shape == (2, 4, 2)
    for i, part in enumerate(grid):  # two hosts each
        assert {d.process_index for d in part.flat} == {2 * i, 2 * i + 1}
    assert len({d.id for d in grid.flat}) == 16


def test_slices_of_tpus_are_found(monkeypatch):
    """With a description of two real slices; data splits over them first."""
    pytest.importorskip("libtpu")
    from sdjax.planning import topologies

    found = topologies.devices(topologies.parse("2*v5e:2x4"))
    assert {d.slice_index for d in found} == {0, 1}
    grid = layout(MeshConfig(data=-1, fsdp=4), list(found), monkeypatch)
    assert grid.shape == (4, 4, 1)
    assert [{d.slice_index for d in row.flat} for row in grid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="multiple of 2"):
        layout(MeshConfig(data=1, fsdp=16), list(found), monkeypatch)


def test_each_host_reads_its_block_once():
    mesh = fake_mesh([[[0], [0]], [[1], [1]]])
    found = shares(mesh)
    assert (found[0].index, found[0].count, found[0].parts) == (0, 2, (0, 1))
    assert (found[1].index, found[1].count, found[1].parts) == (1, 2, (2, 3))
    np.testing.assert_array_equal(positions(mesh, 8), range(8))


def test_hosts_that_hold_the_same_parts_read_the_same():
    found = shares(fake_mesh([[[0, 1], [0, 1]], [[2, 3], [2, 3]]]))  # tensor crosses hosts
    assert [found[h].index for h in range(4)] == [0, 0, 1, 1]
    assert {share.count for share in found.values()} == {2}


def test_hosts_that_alternate_are_told_apart_by_positions():
    """On a torus a host's chips need not be neighbours on the mesh."""
    mesh = fake_mesh([[[0]], [[1]], [[0]], [[1]]])
    assert shares(mesh)[0].parts == (0, 2) and shares(mesh)[1].parts == (1, 3)
    # Host 0 reads examples 0 to 3 of the stream and holds rows 0, 1 and 4, 5 of the array.
    np.testing.assert_array_equal(positions(mesh, 8), [0, 1, 4, 5, 2, 3, 6, 7])


def test_hosts_that_share_some_parts_are_refused():
    with pytest.raises(UserError, match="does not divide evenly among the hosts"):
        shares(fake_mesh([[[0, 0]], [[0, 1]], [[1, 1]]]))


def test_a_batch_lands_where_the_share_says():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = {"x": np.arange(6.0).reshape(3, 2), "y": np.arange(3)}
    placed = global_batch(batch, mesh)
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)
