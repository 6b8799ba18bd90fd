"""With the toy family in FAMILIES: trains in two parts and in one, draws, converts there and back.

python tests/families/toy_run.py FOLDER VAE    # prints JSON
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

LINE = "for family in (SD, SDXL, SD3, FLUX)"


def with_one_line_more() -> None:
    """Load sdjax.families.registry as it would be with the toy in it."""
    spec = importlib.util.find_spec("sdjax.families.registry")
    source = Path(spec.origin).read_text()
    assert source.count(LINE) == 1
    source = source.replace(LINE, LINE.replace(")", ", TOY)"))
    source = source.replace(
        "from sdjax.families.sdxl import SDXL",
        "from sdjax.families.sdxl import SDXL\nfrom tests.families.toy_family import TOY",
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["sdjax.families.registry"] = module
    exec(compile(source, spec.origin, "exec"), module.__dict__)


def recipe(vae: str, data: str):
    from sdjax.config import default, resolve

    c = default(family="toy")
    c.vae_from = vae
    c.data.update(data_dir=data, resolution=16, batch_size=8, shapes_train=40, shapes_test=8,
                  threads=1)  # fmt: skip
    c.tokenizer.vocab_size = 560
    c.optim.learning_rate = 1e-2
    c.ema.profiles = ("0.9",)
    c.train.update(steps=4, log_every=1, checkpoint_every=2, sample_every=0, report=False)
    c.validation.examples = 8
    c.sample.count = 2
    c.sample.sampler.steps = 2
    return c, resolve


def same(a, b) -> bool:
    """Whether two models have the same weights to the bit."""
    return a.params.keys() == b.params.keys() and all(
        np.array_equal(a.params[path], b.params[path]) for path in a.params
    )


def single_files(folder: Path) -> dict:
    """Convert FOLDER/whole to a single file and back, with and without all that may be absent."""
    from sdjax.checkpoints.reading import read_any
    from sdjax.convert import convert
    from sdjax.formats.single_file import Hints
    from sdjax.models import weights

    file, tokenizers = folder / "toy.safetensors", str(folder / "there")
    whole = read_any(folder / "whole")
    convert(folder / "whole", file)
    tensors = weights.load_file(file)
    shift, gates = (whole.params[f"dots.{name}.bias"] for name in ("shift", "gates"))
    half = len(gates) // 2
    laid = np.concatenate([shift, gates[half:], gates[:half]])
    convert(file, folder / "from_file", to="diffusers", tokenizer=tokenizers)
    convert(folder / "from_file", folder / "again", to="workdir")
    convert(folder / "again", folder / "again.safetensors")
    found = {
        "fused and swapped": bool((tensors["conditions.bias"] == laid).all()),
        "file, folder, workdir, file": (folder / "again.safetensors").read_bytes()
        == file.read_bytes(),
        "same bits": same(whole, read_any(folder / "again")),
    }
    # As other programs would write it: without an encoder; without a header and an autoencoder,
    # and with something that is no weight.
    less = {name: value for name, value in tensors.items() if not name.startswith("moods.")}
    header = weights.read_header(file)[1]
    weights.save_file(less, folder / "less.safetensors", metadata=header)
    convert(folder / "less.safetensors", folder / "less", tokenizer=tokenizers)
    found["less"] = list(read_any(folder / "less").networks)
    bare = {name: value for name, value in less.items() if not name.startswith("ae.")}
    weights.save_file(bare | {"note": np.zeros(1, np.float32)}, folder / "bare.safetensors")
    read = read_any(folder / "bare.safetensors", hints=Hints(tokenizer=tokenizers))
    found["bare"] = [read.family.name, list(read.networks), dict(read.settings), *read.ignored]
    found["same shape"] = read.networks["dots"] == whole.networks["dots"]
    return found


def main(folder: Path, vae: str) -> None:
    with_one_line_more()
    from sdjax import convert, sample
    from sdjax.checkpoints.reading import read_any
    from sdjax.train import loop

    config, resolve = recipe(vae, str(folder / "data"))
    assert loop.run(resolve(config), str(folder / "whole")) == loop.DONE
    config.train.update(steps=2, export=False)
    assert loop.run(resolve(config), str(folder / "parts")) == loop.DONE
    config.train.update(steps=4, export=True)
    assert loop.run(resolve(config), str(folder / "parts")) == loop.DONE
    whole, parts = (read_any(folder / name) for name in ("whole", "parts"))
    start, end = (
        json.loads((folder / "whole" / "metrics.jsonl").read_text().splitlines()[i])["train/loss"]
        for i in (0, -1)
    )

    options = ["--prompts=a red circle", "--steps=2"]
    assert sample.main([f"--model={folder / 'whole'}", f"--output={folder / 'a'}", *options]) == 0
    assert convert.main([f"--input={folder / 'whole'}", f"--output={folder / 'there'}"]) == 0
    assert convert.main([f"--input={folder / 'there'}", f"--output={folder / 'back'}"]) == 0
    back = read_any(folder / "back")
    files = single_files(folder)
    assert sample.main([f"--model={folder / 'less'}", f"--output={folder / 'c'}", *options]) == 0
    assert sample.main([f"--model={folder / 'back'}", f"--output={folder / 'b'}", *options]) == 0
    from PIL import Image

    pictures = [np.asarray(Image.open(folder / name / "00000.png")) for name in "ab"]
    moods = back.tokenizers["mood_tokens"]
    print(json.dumps({
        "moods": [moods.title, *moods.encode(["a red circle"]).shape],
        "networks": list(whole.networks),
        "settings": dict(back.settings),
        "resumed to the bit": same(whole, parts),
        "converted to the bit": same(whole, back),
        "same picture": bool((pictures[0] == pictures[1]).all()),
        "losses": [start, end],
        "single files": files,
        "index": json.loads((folder / "there" / "model_index.json").read_text())["_class_name"],
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
