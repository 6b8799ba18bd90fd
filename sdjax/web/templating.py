"""The templates of pages, in which Jinja2 escapes every text, and the policy of their scripts."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a run needs it at its first report, not at its start
    import jinja2


@functools.cache
def environment() -> jinja2.Environment:
    """Return the templates of `sdjax/web/templates`; a name that they lack is an error."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("sdjax.web"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return made


def asset(name: str) -> str:
    """Return a style or a script that stands beside the templates."""
    file = importlib.resources.files("sdjax.web") / "templates" / name
    return file.read_text(encoding="utf-8")


def policy(scripts: Sequence[str]) -> str:
    """Return the content security policy of a page that loads nothing and runs `scripts` alone.

    Text that slipped through the escaping would stay text.
    """
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {allowed}; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def script_of_plots() -> str:
    """Return Plotly's script, which draws all curves."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
