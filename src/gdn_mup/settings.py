"""What every section of a study's configuration has in common: strict keys, immutable values."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Beyond these a number is a slip of the pen, and would end in an overflow or in the machine's memory.
LARGEST_SIZE = 10**6
LARGEST_COUNT = 10**9

Size = Annotated[int, Field(gt=0, le=LARGEST_SIZE)]  # of one axis of an array
Count = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]  # of what is done one after the other
Octaves = Annotated[float, Field(ge=-100, le=100)]  # log₂ of a factor that float32 holds
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Settings(BaseModel):
    """A section of a study file. Unknown keys are errors: a misspelt key must not be ignored silently.

    So are infinities and NaN, which YAML can write.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
