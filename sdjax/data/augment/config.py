"""The group `data.augment` of the configuration."""

from __future__ import annotations

import dataclasses

from sdjax.errors import UserError

# {change: (least, largest) value of its range}, in the order in which they are made.
BOUNDS: dict[str, tuple[float, float]] = {
    "rotation": (-45.0, 45.0),
    "scale": (0.5, 2.0),
    "brightness": (0.0, 10.0),
    "contrast": (0.0, 10.0),
    "saturation": (0.0, 10.0),
    "hue": (-0.5, 0.5),
    "blur": (0.0, 100.0),
    "cutout": (0.0, 1.0),
    "jpeg": (1.0, 95.0),
}
GEOMETRY = ("rotation", "scale")
_WHY = {
    "rotation": "; a larger turn makes captions wrong that say left, right, above or below",
    "jpeg": ", the qualities of JPEG",
}


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the pictures that are trained on.

    Each change has a probability, and a range of which a value is drawn uniformly. `rotation` and
    `scale` are made alike to all named pictures of an example, the others to the main one alone.

    Raises UserError where a field is out of its range.
    """

    rotation: float = 0.0  # probability
    rotation_range: tuple[float, float] = (-10.0, 10.0)  # degrees, anticlockwise
    scale: float = 0.0  # probability
    scale_range: tuple[float, float] = (0.9, 1.1)  # about the centre; above 1 enlarges
    brightness: float = 0.0  # probability
    brightness_range: tuple[float, float] = (0.8, 1.2)  # 0 is black, 1 the picture as it is
    contrast: float = 0.0  # probability
    contrast_range: tuple[float, float] = (0.8, 1.2)  # 0 is grey, 1 the picture as it is
    saturation: float = 0.0  # probability
    saturation_range: tuple[float, float] = (0.8, 1.2)  # 0 is without colour
    hue: float = 0.0  # probability
    hue_range: tuple[float, float] = (-0.05, 0.05)  # of the circle of hues
    blur: float = 0.0  # probability
    blur_range: tuple[float, float] = (0.5, 1.5)  # standard deviation in pixels
    cutout: float = 0.0  # probability
    cutout_range: tuple[float, float] = (0.1, 0.3)  # side of a grey square, of the shorter side
    jpeg: float = 0.0  # probability
    jpeg_range: tuple[float, float] = (40.0, 90.0)  # quality
    labels: bool = False  # say in the caption what was changed

    def __post_init__(self) -> None:
        for name, (least, largest) in BOUNDS.items():
            probability, ends = getattr(self, name), getattr(self, f"{name}_range")
            if not 0 <= probability <= 1:
                raise UserError(f"data.augment.{name} is {probability}; expected 0 to 1")
            if len(ends) != 2 or not least <= ends[0] <= ends[1] <= largest:
                raise UserError(
                    f"data.augment.{name}_range is {ends}; expected (low, high) within {least:g} "
                    f"and {largest:g}{_WHY.get(name, '')}"
                )
        if self.labels and not self.changes:
            raise UserError("data.augment.labels is True, but no change has a probability above 0")

    @property
    def changes(self) -> tuple[str, ...]:
        """The changes that have a probability above 0."""
        return tuple(name for name in BOUNDS if getattr(self, name))

    @property
    def colours(self) -> tuple[str, ...]:
        """Those of `changes` that are made to the main picture alone."""
        return tuple(name for name in self.changes if name not in GEOMETRY)
