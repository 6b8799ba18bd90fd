"""A hook of mkdocs: the pages at the top of the clone join those of docs/, and links follow them.

README.md is the site's first page. A link to a file that is no page, such as a source file, becomes
its name: the site stands alone, wherever the code is kept.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TOP = {"README.md": "index.md", "SECURITY.md": "SECURITY.md", "CONTRIBUTING.md": "CONTRIBUTING.md",
       "CHANGELOG.md": "CHANGELOG.md"}  # fmt: skip
# What a browser fetches to show a page, from another host.
OUTSIDE = re.compile(
    r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of TOP."""
    for source, page in TOP.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Point the page's links from where it lies in the clone to where it lies in the site."""
    source = next((s for s, at in TOP.items() if at == page.file.src_uri), None)
    here = posixpath.dirname(source or f"docs/{page.file.src_uri}")
    start = posixpath.dirname(page.file.src_uri) or "."

    def moved(link: re.Match) -> str:
        image, text, path, anchor = link.groups()
        if re.match(r"\w+:", path):
            return link[0]
        target = posixpath.normpath(posixpath.join(here, path))
        at = TOP.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(at) is None and (ROOT / target).exists():
            return text if "`" in text else f"{text} (`{target}`)"
        return f"{image}[{text}]({posixpath.relpath(at, start)}{anchor or ''})"

    return LINK.sub(moved, markdown)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Raise a PluginError if the page fetches something from outside when it is shown."""
    outside = OUTSIDE.findall(output)
    if outside:
        raise PluginError(f"{page.file.src_uri} fetches {outside}: keep a copy in docs/")
    return output
