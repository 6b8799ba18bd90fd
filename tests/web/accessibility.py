"""axe-core's rules, where its script is: `npm install axe-core`, or $AXE_CORE names the file."""

import os
from pathlib import Path

import pytest

_PLACES = ("node_modules/axe-core/axe.min.js",)


def script():
    """axe-core's script, or the test is skipped."""
    root = Path(__file__).parents[2]
    for place in (os.environ.get("AXE_CORE", ""), *(root / each for each in _PLACES)):
        if place and Path(place).is_file():
            return Path(place).read_text(encoding="utf-8")
    pytest.skip("axe-core is not there: npm install axe-core, or AXE_CORE=FILE of axe.min.js")


def violations(page, axe):
    """What axe-core finds on a page as it is now: (rule, why, the first elements)."""
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        (each["id"], each["help"], [node["html"][:200] for node in each["nodes"][:3]])
        for each in found["violations"]
    ]
