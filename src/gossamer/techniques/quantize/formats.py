"""The setting `format` of techniques that round weights: what follows from it, and what contradicts it."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from gossamer.models.levels import FORMATS, Format
from gossamer.techniques.base import Technique
from gossamer.techniques.quantize.grid import ScaleSearch


class FormatSettings(Technique, ABC):
    """Hold `format`; `bits`, `symmetric` and `group_size` of the class follow from it where they are not given."""

    format: Format = Field(
        "int", description="what codes stand for: int, fp8 (E4M3), mxfp4, nvfp4 or nf4; bits and groups follow from it"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_its_format_says(cls, settings: Any) -> Any:
        return with_what_follows(settings)

    def entry(self) -> dict[str, Any]:
        """Return the recipe entry: {name: settings that differ from the defaults, or from what the format gives}."""
        if self.format == "int":
            return super().entry()
        usual = type(self).model_validate({"format": self.format}).model_dump(mode="json")
        given = self.model_dump(mode="json")
        differing = {name: value for name, value in given.items() if value != usual[name]}
        return {self.name: {"format": self.format, **differing}}


def with_what_follows(settings: Any) -> Any:
    """Return a step's settings with those added that follow from its `format`, where they were not given.

    What was given stays, also where it contradicts the format: then `check_format` refuses it.

    >>> with_what_follows({"format": "nvfp4"})
    {'bits': 4, 'symmetric': True, 'group_size': 16, 'format': 'nvfp4'}
    """
    if not isinstance(settings, Mapping):
        return settings
    form = next((form for name, form in FORMATS.items() if name == settings.get("format")), None)
    if form is None:
        return settings
    return {"bits": form.bits, "symmetric": True, "group_size": form.usual_group_size, **settings}


def check_format(name: Format, bits: int, symmetric: bool, group_size: int | None, scale: ScaleSearch = "mse") -> None:
    """Raise ValueError where settings contradict their format, or a scale search their grid."""
    if scale == "hqq" and (name != "int" or symmetric):
        found = "symmetric" if name == "int" else name
        raise ValueError(f"scale: hqq chooses zero points, and {found} grids have none; use symmetric: false")
    form = FORMATS.get(name)
    if form is not None and (why := form.disagreement(bits, symmetric, group_size)):
        raise ValueError(f"format {name} {why}")
