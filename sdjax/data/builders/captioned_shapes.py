"""TFDS builder `captioned_shapes`: generated pictures of coloured shapes and what they show."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from typing import Any

from PIL import Image

from sdjax.data.builders import shapes
from sdjax.data.config import DataError
from sdjax.data.tfds.features import FORMAT
from sdjax.data.tfds.tfds_on_cpu import quiet_tfds, tfds


@dataclasses.dataclass(eq=False)
class ShapesConfig(tfds.core.BuilderConfig):
    """The numbers of examples, the share with two objects, the colours, what is rare, the seed."""

    train_examples: int = 20_000
    test_examples: int = 512
    pair_fraction: float = 0.35
    colours: str = "named"
    rare: tuple[str, ...] = ()
    seed: int = 0


class CaptionedShapes(tfds.core.GeneratorBasedBuilder):
    """64x64 PNGs of one or two coloured shapes on a light background, captioned.

    Features: image, text (the caption), objects (a JSON list of the drawn objects and their
    places). The order on disk is that of generation. Raise VERSION whenever `shapes.py` draws or
    captions in another way.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Four shapes, eight colours, one or two objects."}
    url_infos = None  # nothing is downloaded

    def _info(self) -> Any:
        side = shapes.IMAGE_SIZE
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
                    "text": tfds.features.Text(),
                    "objects": tfds.features.Text(),
                }
            ),
            supervised_keys=None,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = self.builder_config
        return {
            "train": self._generate_examples("train", config.train_examples),
            "test": self._generate_examples("test", config.test_examples),
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        for index in range(count):
            image, text, scene = shapes.make_example(
                config.seed,
                split,
                index,
                pair_fraction=config.pair_fraction,
                colours=config.colours,
                rare=shapes.parse_rare(config.rare),
            )
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG", compress_level=3)
            png.seek(0)
            objects = json.dumps([dataclasses.asdict(placed) for placed in scene.objects])
            yield index, {"image": png, "text": text, "objects": objects}


def make_builder(
    *,
    data_dir: str,
    train_examples: int,
    test_examples: int,
    pair_fraction: float,
    colours: str = "named",
    rare: tuple[str, ...] = (),
    seed: int = 0,
) -> CaptionedShapes:
    """The builder for these sizes; its name has everything that the data depends on.

    Raises DataError for counts below 1, a share outside [0, 1] or unknown colours.
    """
    for field, count in (("shapes_train", train_examples), ("shapes_test", test_examples)):
        if count < 1:
            raise DataError(f"data.{field} is {count}; expected at least 1")
    if not 0 <= pair_fraction <= 1:
        raise DataError(f"data.shapes_pairs is {pair_fraction}; expected 0 to 1")
    if colours not in shapes.COLOURS:
        raise DataError(f"data.shapes_colours is {colours!r}; expected one of {shapes.COLOURS}")
    try:
        shares = shapes.parse_rare(rare)
    except ValueError as error:
        raise DataError(f"data.shapes_rare has {error}") from error
    drawn = "" if colours == "named" else f"_{colours}"
    drawn += "".join(f"_{w.replace(' ', '-')}{share:g}" for w, share in sorted(shares.items()))
    config = ShapesConfig(
        name=f"train{train_examples}_test{test_examples}_pairs{pair_fraction:g}{drawn}_seed{seed}",
        train_examples=train_examples,
        test_examples=test_examples,
        pair_fraction=pair_fraction,
        colours=colours,
        rare=rare,
        seed=seed,
    )
    with quiet_tfds():
        return CaptionedShapes(config=config, data_dir=data_dir or None, file_format=FORMAT)
