"""The optimizers over all members against torch.optim, one optimizer a member and parameter."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gdn_mup.kernels.optimizer import adamw_step, gradient_norms, parameter_index, sgd_step

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEMBERS, SIZES, SIZE = 3, [700, 1, 63, 1500, 16], 2432  # more than two blocks, parameters across their borders
OFFSETS = [0, 704, 768, 832, 2368]
STEPS = 20


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def positive(low: float, high: float) -> Tensor:
    """A coefficient for each member and parameter, log-uniform."""
    return (torch.rand(MEMBERS, len(SIZES), device=DEVICE) * (high / low)).clamp(min=1) * low


def pieces(row: Tensor) -> list[Tensor]:
    return [row[offset : offset + size] for offset, size in zip(OFFSETS, SIZES, strict=True)]


def train(optimizer: str, momentum: float, bad: int | None = None) -> tuple[Tensor, Tensor]:
    """Values [M, P] after 20 steps of ours and of torch's, on the same random gradients."""
    ours = torch.zeros(MEMBERS, SIZE, device=DEVICE)
    for row in ours:
        for piece in pieces(row):
            piece.normal_()
    rates, decays, epsilons = positive(1e-3, 1e-1), positive(1e-3, 1.0), positive(1e-8, 1e-6)
    clip = torch.rand(MEMBERS, device=DEVICE)
    index = parameter_index(list(zip(OFFSETS, SIZES, strict=True)), SIZE, torch.device(DEVICE))
    mean, square = torch.zeros_like(ours), torch.zeros_like(ours)
    theirs = ours.clone()
    leaves = [[piece.requires_grad_() for piece in pieces(row.detach())] for row in theirs]
    groups = [
        {"params": [leaf], "lr": float(rates[m, p]), "weight_decay": float(decays[m, p])}
        | ({"eps": float(epsilons[m, p])} if optimizer == "adamw" else {})
        for m, row in enumerate(leaves)
        for p, leaf in enumerate(row)
    ]
    peer: torch.optim.Optimizer
    if optimizer == "adamw":
        peer = torch.optim.AdamW(groups, betas=(momentum, 0.95))
    else:
        peer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0)
    peaks = [group["lr"] for group in peer.param_groups]
    for step in range(1, STEPS + 1):
        gradient = torch.zeros_like(ours)
        for m, row in enumerate(gradient):
            for piece, leaf in zip(pieces(row), leaves[m], strict=True):
                piece.normal_()
                leaf.grad = piece * clip[m]
        if bad is not None:
            gradient[bad] = torch.nan
        factor = step / STEPS
        for group, peak in zip(peer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        peer.step()
        scalars = torch.tensor([factor, 1 - momentum**step, 1 - 0.95**step], device=DEVICE)
        if optimizer == "adamw":
            adamw_step(
                ours, gradient, mean, square, index, rates, decays, epsilons, clip, scalars, momentum, 0.95
            )  # fmt: skip
        else:
            sgd_step(ours, gradient, mean, index, rates, decays, clip, scalars, momentum)
    return ours, theirs.detach()


@pytest.mark.parametrize(("optimizer", "momentum"), [("adamw", 0.9), ("sgd", 0.9), ("sgd", 0.0)])
def test_twenty_steps_are_those_of_torch(optimizer: str, momentum: float) -> None:
    ours, theirs = train(optimizer, momentum)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_member_of_nan_stays_alone(optimizer: str) -> None:
    calm, _ = train(optimizer, 0.9)
    torch.manual_seed(0)
    wild, _ = train(optimizer, 0.9, bad=1)
    assert wild[1].isnan().any()
    assert torch.equal(calm[[0, 2]], wild[[0, 2]])


def test_norms_weigh_each_parameter_of_each_member() -> None:
    gradient = torch.zeros(MEMBERS, SIZE, device=DEVICE)
    index = parameter_index(list(zip(OFFSETS, SIZES, strict=True)), SIZE, torch.device(DEVICE))
    weight = torch.rand(MEMBERS, len(SIZES), device=DEVICE)
    expected = torch.zeros(MEMBERS, device=DEVICE)
    for m, row in enumerate(gradient):
        for p, piece in enumerate(pieces(row)):
            piece.normal_()
            expected[m] += weight[m, p] * piece.square().sum()
    torch.testing.assert_close(gradient_norms(gradient, index, weight), expected.sqrt())
