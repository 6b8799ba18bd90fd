"""benchmarks/vs_torch.py: the two steps are the same, and a wrong weight ends it."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
ARGUMENTS = ["--size=test", "--latents=8", "--threads=1", "--blocks=2", "--seconds=0.05"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the module, the Sdjax of one run, its result)."""
    torch = pytest.importorskip("torch")
    import vs_torch
    from sizes import SIZES, Size

    from sdjax.models.unet_config import UNetConfig

    one_level = UNetConfig(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4, cross_attention_dim=24,
    )  # fmt: skip
    SIZES["test"] = Size(one_level, tokens=7)
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    kept, whole, file = [], vs_torch.Sdjax, tmp_path_factory.mktemp("vs_torch") / "result.json"

    class Kept(whole):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    vs_torch.Sdjax = Kept
    try:
        vs_torch.main([*ARGUMENTS, f"--json={file}"])
        yield vs_torch, kept[0], json.loads(file.read_text())
    finally:
        del SIZES["test"]
        vs_torch.Sdjax = whole
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def test_losses_and_norms_agree_and_both_are_timed(run):
    vs_torch, step, result = run
    assert result["parameters"] == sum(v.size for v in step._abstract.values())
    assert result["threads"] == result["torch_threads"] == 1
    assert 0 < result["difference"] < 1e-4 == result["tolerance"]
    ours, theirs = (result["contenders"][name] for name in (vs_torch.OURS, vs_torch.EAGER))
    for what in ("loss", "grad_norm"):
        assert ours[what] == pytest.approx(theirs[what], rel=1e-4)
        assert len(set(ours[what])) == vs_torch.CHECKED_STEPS  # it learns
    assert len(ours["seconds"]["blocks"]) == len(theirs["seconds"]["blocks"]) == 2
    assert theirs["over_sdjax"]["blocks"] == pytest.approx(
        [t / o for t, o in zip(theirs["seconds"]["blocks"], ours["seconds"]["blocks"], strict=True)]
    )


def test_a_spoiled_weight_ends_it_before_anything_is_timed(run, monkeypatch, capsys, tmp_path):
    vs_torch, ours, _ = run
    begin = ours.restart

    def spoiled(tensors):
        name = "mid_block.resnets.0.conv1.weight"
        begin({**tensors, name: 1.1 * tensors[name]})

    monkeypatch.setattr(ours, "restart", spoiled)
    monkeypatch.setattr(vs_torch, "Sdjax", lambda *args: ours)
    file = tmp_path / "result.json"
    with pytest.raises(SystemExit, match="loss of the first steps is .* nothing was timed"):
        vs_torch.main([*ARGUMENTS, f"--json={file}"])
    assert not file.exists() and "sdjax" not in capsys.readouterr().out


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    pytest.importorskip("torch")
    import torch_peer
    import vs_torch

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match="pip install diffusers"):
        torch_peer.make_model(vs_torch.parse(["--size=tiny"]))


def test_more_threads_than_cores():
    import vs_torch

    with pytest.raises(SystemExit, match="expected at most"):
        vs_torch.limit_threads(100_000)
