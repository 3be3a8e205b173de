"""gdn-mup: how the hyperparameters of Gated Delta Networks scale with width."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdn_mup.checks.coordinates import coordinate_check as coordinate_check
    from gdn_mup.modules.scaling import Depth as Depth
    from gdn_mup.modules.scaling import Scaling as Scaling

__version__ = "0.1.0"

_PUBLIC = {
    "Depth": "gdn_mup.modules.scaling",
    "Scaling": "gdn_mup.modules.scaling",
    "coordinate_check": "gdn_mup.checks.coordinates",
}


def __getattr__(name: str) -> Any:
    """The public names are imported when asked for: torch takes seconds, and most commands do without."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
