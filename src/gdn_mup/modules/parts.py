"""Fused parameters: rows of one tensor that are several matrices, each with a growth of its own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from gdn_mup.modules.users import users


class Rows(NamedTuple):
    """How the rows of a fused parameter split: `sizes` one after another, repeated `groups` times."""

    sizes: tuple[int, ...]
    groups: int = 1

    @property
    def total(self) -> int:
        """All rows together."""
        return self.groups * sum(self.sizes)


Split = Callable[[Any], Sequence[int] | Rows]
"""From the module that holds the fused layer to the sizes of its parts, in rows."""

WHOLE = "whole"  # said instead of a split: the rows are one feature axis


def rows_of(split: Split, parent: nn.Module, name: str) -> Rows:
    """The parts of a parameter that a split finds in a model; UserError if it finds none."""
    with users(f"parts: {name}"):
        sizes = split(parent)
        return sizes if isinstance(sizes, Rows) else Rows(tuple(map(int, sizes)))


def known_split(parent: nn.Module, child: str) -> Split | None:
    """The split of a fused layer whose parent is a known type of fla or transformers."""
    package = type(parent).__module__.partition(".")[0]
    return _KNOWN.get((type(parent).__name__, child)) if package in ("fla", "transformers") else None


def _mamba2_in_proj(mixer: Any) -> list[int]:
    state = mixer.n_groups * mixer.ssm_state_size
    return [mixer.intermediate_size, mixer.intermediate_size, state, state, mixer.num_heads]  # z, x, B, C, dt


def _mamba2_conv(mixer: Any) -> list[int]:
    return _mamba2_in_proj(mixer)[1:4]  # x, B, C


def _qwen_in_proj(mixer: Any) -> Rows:
    values = mixer.head_v_dim * mixer.num_v_heads // mixer.num_k_heads
    return Rows((mixer.head_k_dim, mixer.head_k_dim, values, values), groups=mixer.num_k_heads)  # q, k, v, z


def _qwen_conv(mixer: Any) -> list[int]:
    return [mixer.key_dim, mixer.key_dim, mixer.value_dim]  # q, k, v


_KNOWN: dict[tuple[str, str], Split] = {
    ("Mamba2", "in_proj"): _mamba2_in_proj,
    ("Mamba2", "conv1d"): _mamba2_conv,
    ("Mamba2Mixer", "in_proj"): _mamba2_in_proj,
    ("Mamba2Mixer", "conv1d"): _mamba2_conv,
    ("Qwen3NextGatedDeltaNet", "in_proj_qkvz"): _qwen_in_proj,
    ("Qwen3NextGatedDeltaNet", "conv1d"): _qwen_conv,
}
