"""What trains, as one word: `cpu`, `cuda`, `auto` (a GPU where there is one), or so many that train a job together."""

import re
from typing import NamedTuple

from gdn_mup.errors import UserError


class Device(NamedTuple):
    """A kind of device, and how many train each job together."""

    kind: str
    number: int = 1


def parse_device(word: str, key: str = "--device") -> Device:
    """The device that a word such as `cuda` or `2xcuda` names; `key` is where it was written.

    Raises:
        UserError: it names none.
    """
    if word == "auto":
        return Device("auto")
    if match := re.fullmatch(r"(?:([1-9]\d*)x)?(cpu|cuda)", word):
        return Device(match[2], int(match[1] or 1))
    raise UserError(f"{key}: {word!r}: use auto, cpu, cuda or, for two GPUs that train each job together, 2xcuda")
