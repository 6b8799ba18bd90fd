"""The import rule of the README, read from the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sdjax"
ROOMS = ("models", "diffusion", "data", "parallel")
VERBS = ("main", "sample", "convert", "prepare", "encode", "plan", "evaluate", "report", "sweep")
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file):
    """Every module that a file imports, function bodies included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name):
    """`sdjax.models.unet` -> `models`; "" for anything that is not of a room."""
    parts = name.split(".")
    inside = parts[0] == "sdjax" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir()
    return parts[1] if inside else ""


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_nothing_of_another(name):
    for file in (PACKAGE / name).rglob("*.py"):
        others = {room(module) for module in imports(file)} - {"", name}
        assert not others, f"{file.relative_to(PACKAGE)} imports from {sorted(others)}"


@pytest.mark.parametrize("name", ("train", "eval", *ROOMS))
def test_no_room_imports_a_verb(name):
    verbs = {f"sdjax.{verb}" for verb in VERBS}
    for file in (PACKAGE / name).rglob("*.py"):
        assert not verbs & set(imports(file)), file


def test_diffusion_is_maths():
    for file in (PACKAGE / "diffusion").rglob("*.py"):
        roots = {module.split(".")[0] for module in imports(file)}
        assert not roots & {"flax", "ml_collections", "optax", "orbax", "tensorflow"}, file


def test_only_train_knows_optax_and_orbax():
    for file in FILES:
        if file.relative_to(PACKAGE).parts[0] != "train":
            assert not {m.split(".")[0] for m in imports(file)} & {"optax", "orbax"}, file


def test_no_file_imports_the_references_of_the_tests():
    for file in FILES:
        roots = {module.split(".")[0] for module in imports(file)}
        assert not roots & {"torch", "diffusers", "transformers"}, file


def test_neither_torch_nor_tensorflow_is_imported_at_a_start():
    modules = (
        "sdjax.main sdjax.sample sdjax.convert sdjax.train.loop sdjax.train.metrics_log".split()
    )
    code = f"import sys, {', '.join(modules)}; print({{'torch', 'tensorflow'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
