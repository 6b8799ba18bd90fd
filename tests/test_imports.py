"""The rooms of the house and their order, read from the imports themselves."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sdjax"
VERBS = (
    "main",
    "sample",
    "convert",
    "encode",
    "prepare",
    "evaluate",
    "report",
    "plan",
    "sweep",
    "improve",
    "serve",
)
# A room, or a file beside the rooms, imports only what stands before it.
ORDER = (
    "errors", "system", "diffusion", "models", "data", "parallel", "optim", "families", "formats",
    "sampling", "methods", "validation_config", "monitor_config", "typed_tree", "config",
    "config_changes", "config_model", "machine_settings", "recipes", "checkpoints", "encoding",
    "train", "evaluation", "planning", "sweeps", "improving", "web", "verbs", *VERBS, "__main__",
)  # fmt: skip
FLAT = 24  # files of a room; nest before it has more
FILES = {
    file.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", "."): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.name != "__init__.py"
}


@functools.cache
def imports(file):
    """Every module that a file imports, function bodies included."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(found)


def roots(file):
    """The packages that a file imports."""
    return {module.split(".")[0] for module in imports(file)}


def room(module):
    """`sdjax.models.unet` -> `models`; "" for anything that is not of sdjax."""
    parts = module.split(".")
    return parts[1] if parts[0] == "sdjax" and len(parts) > 1 else ""


def test_every_room_and_file_has_its_place_in_the_order():
    assert {room(module) for module in FILES} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_room_imports_only_what_stands_before_it(name):
    before = set(ORDER[: ORDER.index(name) + 1])
    for module, file in FILES.items():
        if room(module) == name:
            after = {room(other) for other in imports(file)} & set(ORDER) - before
            assert not after, f"{module} imports from {sorted(after)}"


def test_no_files_import_one_another_in_a_circle():
    graph = {m: {o for o in imports(file) if o in FILES and o != m} for m, file in FILES.items()}
    while leaves := {module for module, others in graph.items() if not others}:
        graph = {m: others - leaves for m, others in graph.items() if m not in leaves}
    assert not graph, f"circles among {sorted(graph)}"


def test_no_room_is_overfull():
    folders = {file.parent for file in FILES.values()}
    for folder in folders:
        count = sum(file.parent == folder for file in FILES.values())
        assert count <= FLAT, f"{folder.relative_to(PACKAGE)} has {count} files"


def test_diffusion_is_maths():
    for file in (PACKAGE / "diffusion").rglob("*.py"):
        assert not roots(file) & {"flax", "ml_collections", "optax", "orbax", "tensorflow"}, file


@pytest.mark.parametrize(
    "library, rooms", [("optax", {"optim", "train"}), ("orbax", {"checkpoints"})]
)
def test_a_library_of_the_step_or_the_state_stays_in_its_room(library, rooms):
    users = {room(module) for module, file in FILES.items() if library in roots(file)}
    assert users == rooms


def test_no_file_imports_the_references_of_the_tests():
    for file in FILES.values():
        assert not roots(file) & {"torch", "diffusers", "transformers"}, file


def test_neither_torch_nor_tensorflow_is_imported_at_a_start():
    modules = (
        "sdjax.main sdjax.sample sdjax.convert sdjax.train.loop "
        "sdjax.train.monitoring.metrics_log".split()
    )
    code = f"import sys, {', '.join(modules)}; print({{'torch', 'tensorflow'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_programs_in_strings_import_what_is_there():
    """Programs that tests, benchmarks and docs hold as text are seen by no linter."""
    root = PACKAGE.parent
    texts = [
        *root.glob("tests/**/*.py"), *root.glob("benchmarks/*.py"), *root.glob("configs/*.py"),
        *root.glob("docs/**/*.md"), *root.glob("*.md"), *root.glob("tests/*.sh"),
    ]  # fmt: skip
    missing = []
    for file in texts:
        for module, names in re.findall(r"\bfrom (sdjax[\w.]*) import ([\w, ]+)", file.read_text()):
            for name in re.findall(r"(\w+)(?: as \w+)?", names):
                if not is_there(module, name):
                    missing.append(f"{file.relative_to(root)}: {module}.{name}")
    assert not missing


def is_there(module, name):
    """Whether a module of sdjax has a name at its top level, which may be that of a file in it."""
    folder = PACKAGE.parent / module.replace(".", "/")
    if (folder / f"{name}.py").is_file() or (folder / name).is_dir():
        return True
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return file.is_file() and name in names_of(file)


@functools.cache
def names_of(file):
    """The names that a file binds outside functions and classes, within `if` or `try` too."""
    names = set()
    nodes = list(ast.parse(file.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return names
