"""The ground of every value that crosses a process or a file."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

_NUMBERS = (int, float, int | None, float | None)


class Frozen(BaseModel):
    """A value checked at birth, never changed, with no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Given(Frozen):
    """What a user wrote: a number is finite, and neither `yes` nor `no`."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would take true for 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in _NUMBERS:
            raise ValueError(f"{str(value).lower()} is no number")
        return value
