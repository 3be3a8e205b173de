"""A multiplier before a norm: undone without ε, as good as a smaller ε with one, and seen where no norm follows it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from synthetic import in_memory, study
from test_training import MODEL, TRAINING

from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.errors import UserError
from gdn_mup.measurement.multiplier import multiplier_check
from gdn_mup.model import operations
from gdn_mup.model.config import model_shape
from gdn_mup.model.language_model import LanguageModel
from gdn_mup.study.multiplier import multiplier_table, multiplier_verdict
from gdn_mup.training.sweep import Member, Trainer, scaled_model

EPSILONS = (0.0, 1e-7, 1e-5, 1e-3)


def measure(tokens: TokenFile, validation: TokenFile, seeds: Sequence[int] = (0,)) -> xr.Dataset:
    """Both inits and kernel scales at width 32, which is no square of a power of two."""
    scaled = scaled_model(MODEL, 32, "head_dim", tokens.vocabulary_size, ["gdn_mup"], "adamw")
    probe = torch.from_numpy(validation.fixed_batches(1, 2, 24)[0])

    def one(seed: int) -> xr.Dataset:
        def make_trainer(members: Sequence[Member], epsilon: float) -> Trainer:
            model = MODEL.model_copy(update={"norm_epsilon": epsilon})
            return Trainer(members, scaled, model, TRAINING, "adamw", seed, tokens, dtype=torch.float64)

        members, scales = [Member("gdn_mup", 0.02)], ("one", "inverse_root")
        checked = multiplier_check(make_trainer, members, ("study", "usual"), scales, EPSILONS, (0, 2), probe)
        return checked.assign_coords(growth="head_dim", optimizer="adamw", width=32, seed=seed)

    return xr.concat([one(seed) for seed in seeds], "seed")


@pytest.fixture(scope="module")
def checked(tokens: TokenFile, validation: TokenFile) -> xr.Dataset:
    return measure(tokens, validation, seeds=(0, 1, 2))


def test_without_epsilon_nothing_changes_at_init_or_after_training(checked: xr.Dataset) -> None:
    at_zero = checked.sel(epsilon=0)
    assert 0 < at_zero.gradient_change.max() < 1e-12
    assert at_zero.class_gradient_change.max() < 1e-11
    assert abs(at_zero.loss_change).max() < 1e-12
    assert abs(at_zero.trained_loss_change).max() < 1e-9  # AdamW turns rounding of the smallest gradients into updates


def test_the_change_grows_with_epsilon_and_shrinks_with_the_size_of_o(checked: xr.Dataset) -> None:
    reader = checked.class_gradient_change.sel(parameter="o", step=0).mean("seed")
    assert (reader.diff("epsilon") > 0).all()
    large, small = (reader.sel(init=init, kernel_scale="one", epsilon=1e-5) for init in ("study", "usual"))
    assert small > 3 * large
    assert abs(checked.trained_loss_change.sel(init="usual", epsilon=1e-3, step=2)).min() > 1e-6


def test_the_norm_sees_what_the_kernel_scale_makes(checked: xr.Dataset) -> None:
    at_init = checked.sel(step=0, epsilon=0)
    ratio = at_init.mean_square.sel(kernel_scale="inverse_root") / at_init.mean_square.sel(kernel_scale="one")
    head_dim = model_shape(MODEL, 32, "head_dim", 320).head_dim
    np.testing.assert_allclose(ratio.sel(layer=0), 1 / head_dim, rtol=1e-12)
    assert (checked.low_square <= checked.median_square).all()
    assert (checked.share_below_epsilon.sel(epsilon=0) == 0).all()
    assert (checked.share_below_epsilon.sel(init="usual", epsilon=1e-3, step=0) > 0.5).all()


def mixer_arguments(generator: torch.Generator) -> dict[str, Any]:
    shape = model_shape(MODEL, 16, "heads", 320)
    channels, heads = 3 * shape.heads * shape.head_dim, shape.heads

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(2, *sizes, generator=generator, dtype=torch.float64)

    return {
        "y": draw(2 * 12, channels + shape.heads * shape.value_head_dim + 2 * heads),
        "conv": draw(channels, shape.conv_size),
        "A_log": draw(heads),
        "dt_bias": draw(heads),
        "o_norm": draw(shape.value_head_dim),
        "shape": shape,
        "batch": 2,
        "length": 12,
    }


def test_a_multiplier_is_a_smaller_epsilon() -> None:
    arguments = mixer_arguments(torch.Generator().manual_seed(0))
    multiplier = torch.tensor([3.0, 0.7], dtype=torch.float64)
    multiplied = operations.mixer(**arguments, epsilon=0.1, output_multiplier=multiplier)
    for member, factor in enumerate(multiplier.tolist()):
        smaller = operations.mixer(**arguments, epsilon=0.1 / factor**2)
        torch.testing.assert_close(multiplied[member], smaller[member], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(multiplied, operations.mixer(**arguments, epsilon=0.1), rtol=1e-3)


def test_fused_operations_refuse_a_multiplier() -> None:
    pytest.importorskip("triton")
    from gdn_mup.model.fused_operations import FusedOperations

    model = LanguageModel(model_shape(MODEL, 16, "heads", 320), 1)
    model.operations, model.output_multiplier = FusedOperations(model), torch.full((1,), 4.0)
    with pytest.raises(ValueError, match="no multiplier on the delta rule's output"):
        model.operations.mixer(*[None] * 9, output_multiplier=model.output_multiplier)


def test_the_claim_is_reproduced_by_models_and_by_formulae(checked: xr.Dataset) -> None:
    for dataset in (checked, in_memory(study(), "multiplier")):
        verdict, reason = multiplier_verdict(dataset)
        assert verdict == "reproduced", reason
        assert "rank correlation −0.9" in reason or "rank correlation −1.0" in reason


def test_a_multiplier_that_no_norm_follows_refutes_the_claim(
    tokens: TokenFile, validation: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = operations.mixer

    def multiplied_after_the_norm(*arguments: Any) -> torch.Tensor:
        *arguments_, multiplier = arguments
        return mixer(*arguments_) * multiplier[:, None, None]

    monkeypatch.setattr(operations, "mixer", multiplied_after_the_norm)
    verdict, reason = multiplier_verdict(measure(tokens, validation))
    assert verdict == "not reproduced"
    assert "more than rounding" in reason


def test_an_effect_that_grows_with_the_size_of_o_refutes_the_claim() -> None:
    dataset = in_memory(study(), "multiplier")
    inverted = (0.1 * dataset.mean_square.mean("layer") ** 0.25).where(dataset.epsilon > 0, 1e-15)
    planted = dataset.assign(
        class_gradient_change=inverted.expand_dims(parameter=dataset.parameter).transpose(
            *dataset.class_gradient_change.dims
        )
    )
    assert multiplier_verdict(planted)[0] == "not reproduced"


def test_what_was_not_run_decides_nothing(checked: xr.Dataset) -> None:
    assert multiplier_verdict(checked.sel(epsilon=[1e-5])) == ("inconclusive", "ε = 0 was not run")
    verdict, reason = multiplier_verdict(checked.sel(epsilon=[0.0]))
    assert verdict == "inconclusive" and "no ε > 0" in reason
    verdict, reason = multiplier_verdict(checked.sel(seed=[0]))
    assert verdict == "inconclusive" and "one seed" in reason
    with pytest.raises(UserError, match="no multiplier check; add one under `multiplier_checks`"):
        multiplier_table(checked * np.nan)
