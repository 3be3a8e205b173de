"""A study of studies: what no single one can say, since it needs runs of different length.

A comparison is a file in config/comparisons/ that names studies; `training_length` puts their sweeps together. Nothing
here imports numpy: the workflow reads comparisons all the time.
"""

from pathlib import Path

import yaml
from pydantic import Field, ValidationError, field_validator

from gdn_mup.errors import UserError
from gdn_mup.settings import Settings


class Comparison(Settings):
    """A comparison file."""

    question: str = Field(min_length=1, description="What it asks, and what would answer it.")
    studies: tuple[str, ...] = Field(min_length=1, description="Names of studies in config/studies/.")

    @field_validator("studies")
    @classmethod
    def _once(cls, studies: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(studies)) != len(studies):
            raise ValueError(f"named twice: {list(studies)}")
        return studies


def load_comparison(path: Path | str) -> Comparison:
    """Read and check a comparison file. Raises UserError with one line: file, key, value, and what is allowed."""
    path = Path(path)
    if not path.is_file():
        others = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such comparison file; there are: {', '.join(others) or 'none'}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Comparison.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {key or 'the file'}: {problem['msg'].removeprefix('Value error, ')}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
