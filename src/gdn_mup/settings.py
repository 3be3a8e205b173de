"""What every section of a study's configuration has in common: strict keys, immutable values."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A section of a study file. Unknown keys are errors: a misspelt key must not be ignored silently."""

    model_config = ConfigDict(extra="forbid", frozen=True)
