"""The law of a model's init, followed without values, against values that are drawn."""

import math

import pytest
import torch
from module_examples import fla_model, llama, qwen3_next
from torch import Tensor, nn

from gdn_mup.modules.init_law import Filled, InitRecorder, Law


def filled(how: object) -> Law | None:
    """The law of a parameter of 6 × 40 that `how` makes or fills."""
    recorder = InitRecorder()
    with recorder, torch.no_grad():
        made = how(torch.empty(6, 40))
        return recorder.law(nn.Parameter(made))


def in_place(function: object, *args: float) -> object:
    return lambda w: (function(w, *args), w)[1]


@pytest.mark.parametrize(
    ("how", "mean", "std"),
    [
        (in_place(nn.init.normal_, 0.0, 0.02), 0, 0.02),
        (in_place(nn.init.uniform_, 1.0, 3.0), 2, 2 / math.sqrt(12)),
        (in_place(nn.init.kaiming_normal_), 0, math.sqrt(2 / 40)),
        (in_place(nn.init.kaiming_uniform_, math.sqrt(5)), 0, math.sqrt(1 / 3 / 40)),
        (in_place(nn.init.xavier_normal_), 0, math.sqrt(2 / 46)),
        (in_place(nn.init.trunc_normal_, 0.0, 1.0, -2.0, 2.0), 0, 0.8796),
        (in_place(nn.init.zeros_), 0, 0),
        (in_place(nn.init.constant_, 3.0), 3, 0),
        (lambda w: torch.randn(6, 40) * 0.1, 0, 0.1),
        (lambda w: torch.rand_like(w), 0.5, 1 / math.sqrt(12)),
        (lambda w: w.normal_().div_(4).add_(1), 1, 0.25),
        (lambda w: w.copy_(torch.randn(6, 40) * 0.3), 0, 0.3),
        (lambda w: torch.full((6, 40), 2.0), 2, 0),
        (lambda w: torch.randn(6, 40).clamp(min=0.0), 1 / math.sqrt(2 * math.pi), 0.5838),
        (lambda w: torch.randn(6, 40) + torch.randn(6, 40), 0, math.sqrt(2)),  # two draws, independent
        (lambda w: torch.randn(6, 40).abs().add(1).log(), 0.5347, 0.3176),
        (lambda w: torch.randn(6, 40, dtype=torch.cfloat) / 2, 0, 0.5),  # of |w|
        (lambda w: nn.init.normal_(torch.empty(6, 40, dtype=torch.cfloat), std=0.3), 0, 0.3),
        (lambda w: torch.complex(torch.randn(6, 40), torch.randn(6, 40)), 0, math.sqrt(2)),
        (lambda w: torch.view_as_complex(torch.randn(6, 40, 2)), 0, math.sqrt(2)),
    ],
)
def test_the_law_is_that_of_the_calls(how, mean, std):
    law = filled(how)
    assert law[:2] == (pytest.approx(mean, abs=1e-3), pytest.approx(std, rel=2e-3, abs=1e-9))
    assert law.centred == (mean == 0 and std > 0)


@pytest.mark.parametrize(
    ("how", "mean", "std"),
    [
        (lambda w: torch.randn(6, 40) * torch.linspace(0, 2, 240).view(6, 40), 0, 1.1571),
        (lambda w: torch.randn(6, 40, dtype=torch.cfloat).abs(), math.sqrt(math.pi) / 2, 0.4633),
        (lambda w: torch.rand(6, 40) * torch.rand(6, 40), 0.25, 0.2205),
    ],
)
def test_laws_of_several_draws_are_near(how, mean, std):
    assert filled(how)[:2] == (pytest.approx(mean, abs=0.02), pytest.approx(std, rel=0.02))


@pytest.mark.parametrize("how", [in_place(nn.init.orthogonal_), lambda w: w, lambda w: torch.randn(6, 6) @ w])
def test_what_cannot_be_followed_has_no_law(how):
    assert filled(how) is None


@pytest.mark.parametrize("make", [lambda: torch.arange(240.0).view(6, 40), lambda: torch.arange(1.0, 300).log()])
def test_what_is_counted_is_known_and_not_drawn(make):
    for how in (lambda w: make(), lambda w: torch.empty_like(make()).copy_(make()) * 1.0):
        law, values = filled(how), make()
        assert not law.drawn and not law.centred
        assert law[:2] == (pytest.approx(values.mean().item(), rel=0.02), pytest.approx(values.std().item(), rel=0.02))


def apart(how: object) -> tuple[Filled, Tensor]:
    """How `how` fills a tensor, and how often every entry is said to be filled apart."""
    recorder = InitRecorder()
    with recorder, torch.no_grad():
        made = how()
        found = recorder.filled(nn.Parameter(made))
    masks = [region.mask(tuple(made.shape)).long() for region, _ in found.apart]
    return found, sum(masks, torch.zeros(made.shape, dtype=torch.long))


def padded() -> Tensor:
    return nn.Embedding(9, 4, padding_idx=2).weight


def forget_gates() -> Tensor:
    bias = torch.rand(12)
    bias[3:6] = 1.0
    return bias.mul(2).to(torch.bfloat16)


def fused() -> Tensor:
    weight = torch.empty(12, 4)
    for rows in weight.split([6, 2, 4]):
        nn.init.xavier_normal_(rows)
    weight[:6].mul_(3)
    return weight


def columns() -> Tensor:
    weight = torch.randn(6, 4)
    nn.init.trunc_normal_(weight[:, 1], 0.0, 1.0, -2.0, 2.0)
    weight[[0, 4]] = 0.0
    return weight


@pytest.mark.parametrize(
    ("how", "whole", "parts", "counts"),
    [
        (padded, (0, 1), [(0, 0)], [0, 0, 1, 0, 0, 0, 0, 0, 0]),
        (forget_gates, (1, 1 / math.sqrt(3)), [(2, 0)], [0] * 3 + [1] * 3 + [0] * 6),
        (fused, None, [(0, (2 / 6) ** 0.5), (0, 0.5), (0, 3 * 0.2**0.5)], [1] * 12),
        (columns, (0, 1), [(0, 0.8796), (0, 0), (0, 0)], [1.25, 0.25, 0.25, 0.25, 1.25, 0.25]),
        (lambda: torch.cat([torch.randn(2, 3), torch.ones(4, 3)]), None, [(0, 1), (1, 0)], [1] * 6),
        (lambda: fused().zero_(), (0, 0), [], [0] * 12),
    ],
    ids=["padding row", "forget gates", "fused", "columns and rows", "cat", "filled again"],
)
def test_what_was_filled_apart_has_a_law_of_its_own(how, whole, parts, counts):
    found, filled_apart = apart(how)
    close = [None if law is None else pytest.approx(law, abs=2e-3) for law in (whole, *parts)]
    laws = [None if law is None else law[:2] for law in (found.law, *(law for _, law in found.apart))]
    assert laws == close
    assert filled_apart.float().flatten(1).mean(1).tolist() == counts if filled_apart.dim() > 1 else counts


def test_torchs_own_functions_are_back_afterwards():
    before = nn.init._no_grad_trunc_normal_, nn.init.orthogonal_
    with pytest.raises(ZeroDivisionError), InitRecorder():
        _ = 1 / 0
    assert (nn.init._no_grad_trunc_normal_, nn.init.orthogonal_) == before


def test_recording_takes_no_memory_and_models_may_count_and_convert():
    class Usual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
            self.large = nn.Linear(2**20, 2**20, bias=False)  # 4 TiB
            self.old = nn.Parameter(torch.Tensor(5, 7))
            self.mixed = nn.Parameter(torch.randn(4) * torch.arange(4.0))
            self.listed = nn.Parameter(torch.tensor([1.0, 2.0]))
            nn.init.normal_(self.old, std=0.1)
            self.register_buffer("frequencies", 1e4 ** (-torch.arange(0, 8, 2) / 8))

    recorder, state = InitRecorder(), torch.get_rng_state()
    with recorder:
        model = Usual().to(torch.bfloat16)
        assert recorder.law(model.old).std == pytest.approx(0.1) and recorder.law(model.mixed).drawn
        assert recorder.law(model.large.weight).std == pytest.approx(1 / math.sqrt(3 * 2**20), rel=1e-3)
    assert model.rates[2] == pytest.approx(0.1) and model.large.weight.dtype == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), state)


def models() -> dict[str, object]:
    plain = {"qwen3_next": qwen3_next, "llama": llama}
    return plain | {name: fla_model(name) for name in ("GatedDeltaNet", "KDA", "DeltaNet", "Mamba2", "GLA")}


@pytest.mark.parametrize("name", ["qwen3_next", "llama", "GatedDeltaNet", "KDA", "DeltaNet", "Mamba2", "GLA"])
def test_every_parameter_of_other_packages_models_is_followed_to_what_they_draw(name):
    make = models()[name]
    recorder = InitRecorder()
    with recorder:
        laws = {key: recorder.law(parameter) for key, parameter in make(128).named_parameters()}
    torch.manual_seed(0)
    for key, parameter in make(128).named_parameters():
        law, n = laws[key], parameter.numel()
        assert law is not None, key
        drawn: Tensor = parameter.detach().double()
        assert abs(drawn.mean().item() - law.mean) < 5 * law.std / math.sqrt(n) + 1e-6, key
        if n > 100:
            assert drawn.std().item() == pytest.approx(law.std, rel=5 / math.sqrt(2 * n) + 0.01, abs=1e-7), key
