"""The ground of every value that crosses a process or a file."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A value checked at birth, never changed, with no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
