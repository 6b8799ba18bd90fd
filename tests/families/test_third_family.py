"""A new family is files of its own and one line of FAMILIES."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests import conftest

ROOT = Path(__file__).parents[2]


def test_a_family_made_here_trains_resumes_draws_and_converts(tiny_vae, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": conftest.XLA_FLAGS}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("toy_run.py")), str(tmp_path), str(tiny_vae)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    first, last = found.pop("losses")
    assert 0 < last < 10 and first != last
    assert found.pop("single files") == {
        "fused and swapped": True,
        "file, folder, workdir, file": True,
        "same bits": True,
        "less": ["dots", "words", "vae"],
        "bare": ["toy", ["dots", "words"], {"light": 0.25}, "note"],
        "same shape": True,
    }
    assert found == {
        "networks": ["dots", "words", "moods", "vae"],
        "settings": {"light": 0.5, "mood_length": 7},
        "moods": ["T5", 1, 7],
        "resumed to the bit": True,
        "converted to the bit": True,
        "same picture": True,
        "index": "ToyPipeline",
    }


OWN = ("sd", "sdxl", "sd3", "flux")  # beginnings of the names of their files


def test_what_belongs_to_a_family_stands_in_its_file():
    own = re.compile(
        "text_encoder_2|time_ids|zero_empty|aesthetic|is_xl|StableDiffusion\\w*Pipeline"
    )
    for file in sorted((ROOT / "sdjax").rglob("*.py")):
        if file.parent.name == "families" and file.name.split("_")[0].removesuffix(".py") in OWN:
            continue
        found = own.findall(file.read_text())
        assert not found, f"{file}: {sorted(set(found))}"


def test_readers_and_writers_of_models_name_no_network_and_no_prefix():
    own = re.compile("[\"']unet[\"']|diffusion_model\\.|first_stage|cond_stage|families\\.sd")
    rooms = ("checkpoints", "formats")
    for file in sorted(file for room in rooms for file in (ROOT / "sdjax" / room).rglob("*.py")):
        found = own.findall(file.read_text())
        assert not found, f"{file}: {sorted(set(found))}"
