"""TensorFlow sees no accelerator, whoever imports it, and is not imported before it is needed."""

import importlib
import subprocess
import sys

import pytest

from sdjax.system import tensorflow_on_cpu

FAKE = """
from types import SimpleNamespace
hidden = []
config = SimpleNamespace(set_visible_devices=lambda devices, kind: hidden.append((devices, kind)))
"""
WITHOUT = """
import sys
from sdjax.data.config import DataConfig
from sdjax.data.pipeline import captions, make_iterator
from sdjax.data.text.tokenizer import Tokenizer

config = DataConfig(
    name="captioned_shapes", data_dir=sys.argv[1], shapes_train=16, shapes_test=4, batch_size=4
)
texts = captions(config, "train")
tokenizer = Tokenizer.train(texts, vocab_size=520, context_length=8)
batch = next(make_iterator(config, {"tokens": tokenizer}, split="train", seed=0))
print(len(texts), batch["image"].shape, "tensorflow" in sys.modules)
"""


@pytest.fixture
def fake_tensorflow(tmp_path, monkeypatch):
    """A module of that name which says what was hidden from it."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorflow"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    sys.modules.pop("tensorflow", None)


def test_accelerators_are_hidden_as_soon_as_tensorflow_is_imported(fake_tensorflow):
    tensorflow_on_cpu.prepare()
    tensorflow_on_cpu.prepare()  # twice is once
    assert importlib.util.find_spec("tensorflow").origin.endswith("__init__.py")
    assert "tensorflow" not in sys.modules
    import tensorflow as tf

    assert tf.hidden == [([], "GPU"), ([], "TPU")]


def test_accelerators_are_hidden_from_a_tensorflow_that_is_there_already(fake_tensorflow):
    import tensorflow as tf

    tf.hidden.clear()
    tensorflow_on_cpu.prepare()
    assert tf.hidden == [([], "GPU"), ([], "TPU")]


def test_generated_pictures_are_prepared_and_read_without_tensorflow(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[-2] == "16 (4, 64, 64, 3) False"
