"""The fused operations against PyTorch's, on whole models: losses and every parameter's gradient.

On a GPU in float16 against float32; elsewhere in Triton's interpreter, in float32. (Training is in bfloat16, but in so
small a model rounding the parameters to its 8 bits alone moves gradients by up to 8 %; with float16's 11 bits an
error shows. `tests/gpu` compares larger models in bfloat16.)
"""

import pytest
import torch
from torch import Tensor

from gdn_mup.model.config import GrowthMode, ModelSettings, model_shape
from gdn_mup.model.language_model import LanguageModel, initialize, parameter_table
from gdn_mup.scaling.apply import scale_rule_sets

pytest.importorskip("triton")

from gdn_mup.model.fused_operations import FusedOperations
from gdn_mup.training.clipping import norm_weights
from gdn_mup.training.config import OptimizerName, TrainingSettings
from gdn_mup.training.gpu import FusedOptimizer
from gdn_mup.training.optimizers import MemberOptimizer, Optimizer

pytestmark = pytest.mark.gpu
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)
# Relative, by norm. Products of numbers of 11 bits, through two layers and back; float32 sums in another order. Gates'
# scalars are sums over all tokens of terms that nearly cancel.
LOSS, GRADIENT, SCALAR_GRADIENT = (1e-4, 2e-2, 5e-2) if CUDA else (1e-6, 1e-4, 1e-4)
RULES = ["sp", "mup", "gdn_mup"]
VOCABULARY, BATCH, LENGTH = 50, 2, 37


SETTINGS = ModelSettings(base_width=16, layers=2, heads=2, head_dim=8, value_head_dim=12)


def make_model(growth: GrowthMode, tied: bool) -> LanguageModel:
    settings = SETTINGS.model_copy(update={"tied_embeddings": tied})
    base, target = (model_shape(settings, width, growth, VOCABULARY) for width in (16, 32))
    scalings = scale_rule_sets(parameter_table(base), parameter_table(target), 2, RULES, "adamw")
    model = LanguageModel(target, len(RULES), device=DEVICE)
    initialize(model, base, settings.initial_scale, list(scalings.values()), seed=0)
    return model


def losses_and_gradients(model: LanguageModel, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = model.losses(batch)
    losses.sum().backward()
    return losses.detach(), {name: gradient.clone() for name, gradient in model.gradients().items()}


@pytest.fixture
def batch() -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize(("growth", "tied"), [pytest.param("heads", False, marks=pytest.mark.slow), ("head_dim", True)])
def test_fused_operations_are_the_operations(growth: GrowthMode, tied: bool, batch: Tensor) -> None:
    model = make_model(growth, tied)
    losses, gradients = losses_and_gradients(model, batch)
    model.operations = FusedOperations(model, DTYPE)
    fused_losses, fused_gradients = losses_and_gradients(model, batch)
    torch.testing.assert_close(fused_losses, losses, rtol=LOSS, atol=0)
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        tolerance = SCALAR_GRADIENT if name.endswith(("A_log", "dt_bias")) else GRADIENT
        for member, rules in enumerate(RULES):
            difference = (fused_gradients[name][member] - gradient[member]).norm() / gradient[member].norm()
            assert difference <= tolerance, (name, rules, float(difference))
    with torch.no_grad():
        torch.testing.assert_close(model.losses(batch), fused_losses)


@pytest.mark.slow
def test_a_member_of_nan_stays_alone(batch: Tensor) -> None:
    model = make_model("heads", tied=False)
    model.operations = FusedOperations(model, DTYPE)
    calm_losses, calm = losses_and_gradients(model, batch)
    model.weights["0.q"][1, 0, 0] = torch.nan
    wild_losses, wild = losses_and_gradients(model, batch)
    assert wild_losses[1].isnan()
    assert torch.equal(calm_losses[[0, 2]], wild_losses[[0, 2]])
    assert all(torch.equal(calm[name][[0, 2]], wild[name][[0, 2]]) for name in calm)


@pytest.mark.slow
def test_a_member_alone_is_the_member_in_company(batch: Tensor) -> None:
    company = make_model("heads", tied=False)
    company.operations = FusedOperations(company, DTYPE)
    losses, gradients = losses_and_gradients(company, batch)
    alone = LanguageModel(company.shape, 1, device=DEVICE)
    alone.flat.copy_(company.flat[2:])
    alone.operations = FusedOperations(alone, DTYPE)
    own_losses, own_gradients = losses_and_gradients(alone, batch)
    torch.testing.assert_close(own_losses[0], losses[2], rtol=1e-5, atol=0)
    for name, gradient in own_gradients.items():
        # Sums over tokens may be cut in other pieces.
        difference = (gradient[0] - gradients[name][2]).norm() / gradient[0].norm()
        assert difference <= (1e-2 if CUDA else 1e-5), (name, float(difference))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_with_the_fused_optimizer_is_training(optimizer: OptimizerName, batch: Tensor) -> None:
    """Three steps, clipped and with weight decay, against torch's optimizers on one slice a member and parameter."""
    training = TrainingSettings(weight_decay=0.1, clipping="width_invariant_norm", clip_norm=0.5)
    tables = [parameter_table(model_shape(SETTINGS, width, "heads", VOCABULARY)) for width in (16, 32)]
    scalings = list(scale_rule_sets(*tables, 2, RULES, optimizer).values())
    sgd_scalings = list(scale_rule_sets(*tables, 2, RULES, "sgd").values())
    rates = [1e-3, 2e-3, 4e-3]
    found = {}
    for kind in ("torch", "fused"):
        model = make_model("heads", tied=False)
        weights = norm_weights(training.clipping, sgd_scalings, list(model.weights), torch.device(DEVICE))
        arguments = scalings, rates, weights, training
        steps: Optimizer
        if kind == "fused":
            model.operations = FusedOperations(model, DTYPE)
            steps = FusedOptimizer(optimizer, model, model.operations.gradient, *arguments)
        else:
            steps = MemberOptimizer(optimizer, model, *arguments)
        start = model.flat.clone()
        norms = []
        for factor in (0.5, 1.0, 0.5):
            losses_and_gradients(model, batch)
            norms.append(steps.step(factor))
        found[kind] = model.flat - start, norms[0]
    change = found["torch"][0].norm()
    # AdamW's first steps are signs of gradients: where a gradient is rounding, so is its sign.
    assert (found["fused"][0] - found["torch"][0]).norm() <= (0.1 if CUDA else 1e-2) * change
    torch.testing.assert_close(found["fused"][1], found["torch"][1], rtol=2e-2 if CUDA else 1e-4, atol=0)
