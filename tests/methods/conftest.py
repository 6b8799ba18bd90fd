"""A tiny model to begin from."""

import numpy as np
import pytest

from sdjax.checkpoints.assemble import assemble
from sdjax.config import resolve
from sdjax.config_model import method_of_run, model_of_run
from sdjax.formats.diffusers_folder import write_diffusers
from tests.conftest import make_tiny_config


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_vae, shapes_dir):
    """A diffusers folder of the networks of `tiny_config`, with random weights."""
    assembled = assemble(resolve(make_tiny_config(tiny_vae, shapes_dir)))
    method = method_of_run(assembled.config, assembled.tokenizers)
    rng = np.random.default_rng(0)
    drawn = {
        path: rng.normal(size=v.shape, scale=0.1).astype(np.float32)
        for path, v in method.abstract.items()
    }
    folder = tmp_path_factory.mktemp("tiny") / "model"
    params = drawn | assembled.params
    write_diffusers(folder, model_of_run(assembled.config, assembled.tokenizers, params))
    return folder
