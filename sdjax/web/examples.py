"""example_loss.html: the examples of a split that a model finds worst and best, with captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from PIL import Image

from sdjax.evaluation.losses import EXAMPLES_FILE, OUTLIER, Example, ExampleLosses
from sdjax.system import paths
from sdjax.web import templating
from sdjax.web.report.pictures import Picture, packed

PAGE_FILE = "example_loss.html"
MOST = 48  # examples of a section
SIDE = 192  # pixels of the longer side


@dataclasses.dataclass(frozen=True)
class Shown:
    """An example of the page. picture: None for a dataset without pictures."""

    example: Example
    picture: Picture | None

    @property
    def numbers(self) -> list[tuple[str, str]]:
        """The losses of the example, as (name, text)."""
        one = self.example
        rows = [("score", f"{one.score:+.2f}"), ("loss", f"{one.loss:.4g}")]
        if one.caption_score is not None:
            rows.insert(1, ("caption score", f"{one.caption_score:+.2f}"))
            rows.append(("without caption", f"{one.uncaptioned:.4g}"))
        return rows


def write_examples(folder: paths.Path, found: ExampleLosses, title: str) -> paths.Path:
    """Write the page of the worst and the best examples, and return its path.

    Args:
        folder: of the evaluation.
        title: the model and the dataset.

    Raises:
        OSError: the page cannot be written.
    """
    page = folder / PAGE_FILE
    # Captions may hold halves of letters, which no text file can.
    paths.write_text(page, render(found, title).encode("utf-8", "replace").decode("utf-8"))
    return page


def render(found: ExampleLosses, title: str) -> str:
    """Return the page as HTML, which loads nothing and runs no script."""
    most = max(1, min(MOST, len(found.examples) // 2))
    sections = [
        ("Captions that help least", found.by_caption[:most]),
        ("Highest losses", found.examples[:most]),
        ("Lowest losses", found.examples[::-1][:most]),
    ]
    made: dict[str, Shown] = {}
    return templating.environment().get_template("examples.html").render(
        title=title,
        found=found,
        outliers=sum(one.score > OUTLIER for one in found.examples),
        threshold=OUTLIER,
        table=EXAMPLES_FILE,
        sections=[(name, _shown(found, chosen, made)) for name, chosen in sections if chosen],
        style=templating.asset("report.css"),
        policy=templating.policy(()),
    )  # fmt: skip


def _shown(found: ExampleLosses, chosen: Sequence[Example], made: dict[str, Shown]) -> list[Shown]:
    """With their pictures, each of which is read once; `made` keeps them."""
    for one in chosen:
        place = f"{one.part}/{one.number}"
        if place not in made:
            picture = None
            if found.read is not None:
                image = Image.fromarray(found.read(one))
                image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                picture = packed(one.key, image)
            made[place] = Shown(one, picture)
    return [made[f"{one.part}/{one.number}"] for one in chosen]
