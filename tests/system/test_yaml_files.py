"""YAML of strangers: no objects, no bombs, no key twice."""

import time

import pytest

from sdjax.config import Config
from sdjax.evaluation.audit import AuditError, read_audit
from sdjax.models.config import ConfigError
from sdjax.sweeps.space import read_space
from sdjax.system.text_files import TextError
from sdjax.system.yaml_files import read_yaml

LAUGHS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))
LAUGHS = f"a0: &a0 [lol]\n{LAUGHS}\n"
MERGES = "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 40))

REFUSED = {
    "an object": ("a: !!python/object/apply:os.system ['true']", "could not determine a con"),
    "merges that double": (f"a0: &a0 {{k: 1}}\n{MERGES}", r"merged groups \(<<\) are not read"),
    "lists 5,000 deep": ("[" * 5000, "nested more than 100 deep"),
    "lists 200 deep": ("[" * 200 + "]" * 200, "nested more than 100 deep"),
    "a list in itself": ("a: &a [*a]", "nested more than 100 deep"),
    "a number of 5,000 digits": ("a: " + "9" * 5000, "4,300 digits"),
    "a date that is none": ("a: 2001-99-99", "month must be"),
    "a key twice": ("a: 1\nb: 2\na: 3", "'a' is there twice in line 3"),
    "a list as a key": ("? [a, b]\n: 1", "unhashable key"),
    "binary that is none": ("a: !!binary x", "decode"),
    "a control character": ("a: \x07", "special characters are not allowed|ReaderError"),
    "more than half a mebibyte": ("# " + "x" * 2**19, "bytes; expected at most 524,288"),
    "rows 2,000 deep": ("- " * 2000 + "a", "nested too deeply"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_yaml_that_does_much_is_refused_in_words(tmp_path, name):
    content, message = REFUSED[name]
    file = tmp_path / "a.yaml"
    file.write_text(content)
    for read, error in (
        (read_yaml, TextError),
        (read_audit, AuditError),
        (lambda path: read_space(path, Config()), ConfigError),
    ):
        with pytest.raises(error, match=f"a.yaml.*({message})"):
            read(file)


def test_laughs_are_read_and_said_in_few_words(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(LAUGHS)
    began = time.perf_counter()
    assert len(read_yaml(file)["a39"]) == 9
    file.write_text(f"{LAUGHS}\nprompts: *a39\n")
    with pytest.raises(AuditError, match="unknown field a0, a1") as seen:
        read_audit(file)
    assert len(str(seen.value)) < 500
    hidden = LAUGHS.replace("\n", "\n  ")
    for field in ("prompts", "attributes", "labeller", "targets"):
        file.write_text(
            "prompts:\n- a\npictures_per_prompt: 1\nattributes: {a: [b, c]}\n".replace(
                f"{field}: {{a: [b, c]}}", ""
            )
            + f"{field + '2' if field == 'prompts' else field}:\n  {hidden}"
        )
        with pytest.raises(AuditError) as seen:
            read_audit(file)
        assert len(str(seen.value)) < 1000
    file.write_text(f"fields:\n  {hidden}")
    with pytest.raises(ConfigError) as seen:
        read_space(file, Config())
    assert len(str(seen.value)) < 20_000
    assert time.perf_counter() - began < 30


def test_an_audit_of_many_prompts_is_read_in_time_that_grows_with_them(tmp_path):
    prompts = "\n".join(f"- prompt {i}" for i in range(3000))
    file = tmp_path / "a.yaml"
    file.write_text(
        f"prompts:\n{prompts}\npictures_per_prompt: 1\nattributes: {{a: {{b: [c], d: [e]}}}}\n"
    )
    assert len(read_audit(file).prompts) == 3000
