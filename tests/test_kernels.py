"""Which Triton is refused, where, and what is said."""

import pytest

from gdn_mup.errors import UserError
from gdn_mup.model.kernels import check_triton


@pytest.mark.parametrize("triton", ["3.4.0", "3.5.1", "3.6.0", "3.7.0"])
def test_wrong_gradients_on_hopper_are_refused_with_both_cures(triton: str) -> None:
    with pytest.raises(UserError, match=rf"triton {triton} gives wrong gradients.*triton>=3\.7\.1.*tilelang"):
        check_triton(triton, (9, 0), has_tilelang=False)


@pytest.mark.parametrize(
    ("triton", "capability", "has_tilelang"),
    [("3.3.1", (9, 0), False), ("3.7.1", (9, 0), False), ("3.6.0", (8, 0), False), ("3.6.0", (9, 0), True)],
)
def test_what_is_right_is_let_through(triton: str, capability: tuple[int, int], has_tilelang: bool) -> None:
    check_triton(triton, capability, has_tilelang)
