"""Pages name what is there: paths, links, configuration fields, commands and their options."""

import dataclasses
import functools
import importlib
import itertools
import re
import typing
from pathlib import Path

import pytest
from absl import flags

from sdjax.__main__ import VERBS
from sdjax.config import VARIANTS, Config
from tests import config_table

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(page.relative_to(ROOT)) for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)
FOLDERS = "sdjax|configs|tests|benchmarks|launch|docs"
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]+\b(?!\.md)")  # as in docs/plans/NAME.json
OTHERS_OPTIONS = {"runner"}  # of Apache Beam
GROUPS = {f.name for f in dataclasses.fields(Config)}


def text_of(page):
    """The page without its comments."""
    return re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(), flags=re.S)


def prose_of(page):
    """The page without blocks of code."""
    return re.sub(r"^```.*?^```|^    .*?$", "", text_of(page), flags=re.S | re.M)


def commands_of(page):
    """Command lines of blocks and of words in backticks, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text_of(page))
    blocks = re.findall(r"^    (.*)$", joined, flags=re.M)
    fenced = re.findall(r"^```\w*\n(.*?)^```", joined, flags=re.S | re.M)
    quoted = re.findall(r"`([^`\n]+)`", prose_of(page))
    return [*blocks, *itertools.chain(*(block.splitlines() for block in fenced)), *quoted]


def expanded(path):
    """`a/{b,c}.py` -> `a/b.py`, `a/c.py`."""
    found = re.search(r"\{([^{}]*)\}", path)
    if found is None:
        return [path]
    return [
        whole
        for option in found[1].split(",")
        for whole in expanded(path[: found.start()] + option + path[found.end() :])
    ]


@pytest.mark.parametrize("page", PAGES)
def test_path_named_in_a_page_exists(page):
    named = re.findall(rf"(?<![\w./:$<-])((?:{FOLDERS})/[\w./{{}},*-]+)", text_of(page))
    missing = []
    for path in itertools.chain(*(expanded(name.rstrip(".,")) for name in named)):
        if not found(path):
            missing.append(path)
    assert not missing


def found(path):
    """Whether a path from the root is there; words in capitals and `*` stand for any."""
    return any(ROOT.glob(PLACEHOLDER.sub("*", path).rstrip("/")))


def test_page_named_in_the_code_exists():
    folders = ("sdjax", "configs", "benchmarks", "launch", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.*")]
    missing = []
    for file in (*files, ROOT / "pyproject.toml", ROOT / "Makefile"):
        if file.suffix in (".py", ".sh", ".yaml", ".toml", ".css", ".js", ""):
            named = re.findall(r"(?<![\w./])docs/[\w/]+\.\w+", file.read_text())
            missing += [f"{file.name}: {name}" for name in named if not found(name)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_module_named_in_a_page_exists(page):
    missing = []
    for dotted in re.findall(r"\bsdjax(?:\.[a-z_0-9]+)+(?!\w)", text_of(page)):
        parts = dotted.split(".")
        module = next(
            (n for n in range(len(parts), 0, -1) if _module_file("/".join(parts[:n]))), None
        )
        rest = parts[module:]
        source = _module_file("/".join(parts[:module])).read_text()
        if (
            len(rest) > 1
            or rest
            and not re.search(rf"^(def|class) {rest[0]}\b|^{rest[0]} =", source, re.M)
        ):
            missing.append(dotted)
    assert not missing


def _module_file(path):
    files = (ROOT / f"{path}.py", ROOT / path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def anchors_of(page):
    """The anchors that a heading gets where the page is shown."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose_of(page), flags=re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_link_to_a_page_or_anchor_resolves(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not target.is_relative_to(ROOT) or not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors_of(target.relative_to(ROOT)):
            broken.append(link)
    assert not broken


def has_field(cls, names):
    """Whether a dotted name is a field of a dataclass, or of any that a field may hold."""
    if not names:
        return True
    hints = typing.get_type_hints(cls)
    return names[0] in hints and (
        len(names) == 1 or any(has_field(held, names[1:]) for held in held_by(hints[names[0]]))
    )


def held_by(hint):
    """The dataclasses that a field may hold; of a group that is one of several, each of these."""
    for held in config_table.held_by(hint):
        yield from VARIANTS[held][1].values() if held in VARIANTS else [held]


def test_page_of_the_fields_is_that_of_the_dataclasses():
    assert (ROOT / "docs" / "config.md").read_text() == config_table.page(), (
        "run: python -m tests.config_table > docs/config.md"
    )


@pytest.mark.parametrize("page", PAGES)
def test_field_named_in_a_page_is_one_of_the_configuration(page):
    text = text_of(page)
    name = r"([a-z_]\w*(?:\.[a-z_]\w*)*)"
    named = re.findall(rf"--config\.{name}", text)
    named += re.findall(rf"\bconfig\.{name}(?![\w.]*\()", text)
    named += re.findall(rf"^    c\.{name} =", text, flags=re.M)
    named += [
        whole
        for whole in re.findall(rf"`{name}(?: ?= ?[^`]*)?`", text)
        if "." in whole and whole.split(".")[0] in GROUPS
    ]
    fields = {n for n in named if not re.search(r"(^|\.)(json|py|md)$", n)}
    unknown = {n for n in fields if not has_field(Config, n.split("."))}
    assert not unknown


@functools.cache
def options_of(verb):
    """The names of a verb's options, without their dashes."""
    module = importlib.import_module(f"sdjax.{verb}")
    if hasattr(module, "parser"):
        actions = module.parser()._actions
        return {name.lstrip("-") for action in actions for name in action.option_strings}
    values = getattr(module, "FLAGS", flags.FLAGS)
    names = set(values)
    return names | {f"no{name}" for name in names if values[name].boolean}


@pytest.mark.parametrize("page", PAGES)
def test_option_of_a_command_in_a_page_is_one_of_the_verb(page):
    unknown = []
    for command in commands_of(page):
        found = re.search(rf"(?:^|python3? -m )(?:sdjax[. ])?({'|'.join(VERBS)}) (.*)", command)
        if not found:
            continue
        verb, rest = found.groups()
        given = re.findall(r"(?:^|[\s(])--?([a-z]\w*)", rest.split(" -- ")[0].split(" # ")[0])
        verb = "encode" if "encode" in given else verb
        unknown += [f"{verb} --{name}" for name in given if name not in options_of(verb)]
    assert not unknown


@pytest.mark.parametrize("page", PAGES)
def test_option_named_alone_in_a_page_is_one_of_some_verb(page):
    known = set().union(*(options_of(verb) for verb in (*VERBS, "encode")))
    sources = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests" / "fuzz").glob("*.py")]
    scripts = "".join(file.read_text() for file in sources)
    unknown = [
        name
        for name in re.findall(r"`--(?:\[no\])?([a-z][\w-]*)", prose_of(page))
        if name not in known | OTHERS_OPTIONS and f'"--{name}"' not in scripts
    ]
    assert not unknown


@pytest.mark.parametrize("page", PAGES)
def test_make_target_named_in_a_page_exists(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = [m for c in commands_of(page) for m in re.findall(r"^(?:\w+=\S+ )*make ([\w-]+)", c)]
    assert set(named) <= targets


def test_every_page_has_its_place_in_the_site_and_every_note_in_the_index():
    named = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    top = {"index.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"}  # docs/site_pages.py
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert pages | top == set(named)
    linked = set(re.findall(r"\]\(([\w/]+\.md)\)", text_of("docs/notes/index.md")))
    notes = {page.removeprefix("notes/") for page in pages if page.startswith("notes/")}
    assert notes - {"index.md"} <= linked


def test_every_recipe_has_a_row():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "recipes.md").read_text(), flags=re.M)
    named = sorted(itertools.chain(*(re.findall(r"`(\w+)`", row) for row in rows)))
    assert named == sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
