"""What every part of a config has in common: frozen, closed to unknown keys, documented, and free of dead settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

AT_FIELD = "at_field"

MAX_STEPS = 8
"""Network evaluations per sample that a student may take."""


@dataclass(frozen=True)
class Needs:
    """Says of a field that it does something only where another field of its section is on, or has one value.

    A setting that is given and then not read is a mistake, and one that no result would show. To be used as
    `r1_weight: Annotated[float, Needs("gan_weight")] = 0.0`.

    Attributes:
        field: the other field's name.
        value: the value it must have; None: any that is on (not 0, not false, not null).
    """

    field: str
    value: str | None = None

    def met(self, section: BaseModel) -> bool:
        """Whether the other field is as it must be."""
        other = getattr(section, self.field)
        return bool(other) if self.value is None else other == self.value


class Section(BaseModel):
    """A part of a config: an unknown key, an infinite number or a setting without effect is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse `steps: true`, which would otherwise be read as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"true and false are not allowed here; found {str(value).lower()}")
        return value

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        for name, field in type(self).model_fields.items():
            if getattr(self, name) == field.get_default(call_default_factory=True, validated_data={}):
                continue
            for need in field.metadata:
                if isinstance(need, Needs) and not need.met(self):
                    wanted = need.field if need.value is None else f"{need.field}={need.value}"
                    raise mistake_at(name, f"{found(getattr(self, name))} given; it does nothing without {wanted}")
        return self


def mistake_at(field: str, message: str) -> PydanticCustomError:
    """What a check of a whole section raises, so that the line names the field."""
    return PydanticCustomError(AT_FIELD, "{message}", {"field": field, "message": message})


def _rising(window: tuple[float, float]) -> tuple[float, float]:
    if not window[0] < window[1]:
        raise ValueError(f"the first number must be below the second; found {list(window)}")
    return window


def _share(window: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= window[0] < window[1] <= 1:
        raise ValueError(f"two rising numbers from 0 to 1 are needed; found {list(window)}")
    return window


Range = Annotated[tuple[float, float], AfterValidator(_rising)]
"""Two numbers, the smaller one first."""

Window = Annotated[tuple[float, float], AfterValidator(_share)]
"""A part of the unit interval, such as (0.02, 0.98)."""


def found(value: Any) -> str:
    """A value as a message shows it: short, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
