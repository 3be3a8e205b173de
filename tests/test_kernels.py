"""Which Triton is refused, where, and what is said."""

from collections.abc import Iterator

import pytest
import torch

from gdn_mup.errors import UserError
from gdn_mup.model.kernels import check_delta_rule, check_triton


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


@pytest.fixture
def fresh_check() -> Iterator[None]:
    check_delta_rule.cache_clear()
    yield
    check_delta_rule.cache_clear()


CUDA = torch.cuda.is_available()
TRY = {"device": torch.device("cuda")}
if not CUDA:  # in the interpreter: two chunks and a part
    TRY = {"device": torch.device("cpu"), "dtype": torch.float32, "rows": 4, "length": 150}


@pytest.mark.gpu
def test_right_kernels_pass_the_check(fresh_check: None) -> None:
    pytest.importorskip("triton")
    differences = check_delta_rule(16, 24, **TRY)
    assert set(differences) == {"o", "dq", "dk", "dv", "dlog_decay", "dbeta"}


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1.05, -1.0, torch.nan])
def test_kernels_that_are_wrong_are_refused(factor: float, fresh_check: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one wrong gradient looks like: said which, by how much, and what to do."""
    kernels = pytest.importorskip("gdn_mup.kernels.delta_rule")
    backward = kernels.backward

    def wrong(*arguments: object, **options: object) -> object:
        gradients = backward(*arguments, **options)
        return gradients._replace(beta=gradients.beta * factor)

    monkeypatch.setattr(kernels, "backward", wrong)
    with pytest.raises(
        UserError, match=r"triton [\d.]+ computes the gated delta rule wrongly.*dbeta is off by .*install"
    ):
        check_delta_rule(16, 24, **TRY)
