"""Coordinate check and transfer report of a model of one's own, as a library and from the command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from command_line import gdn_mup
from module_examples import Mlp
from torch import Tensor, nn

from gdn_mup import coordinate_check
from gdn_mup.checks.commands import _learning_rates
from gdn_mup.checks.findings import exponents, findings
from gdn_mup.checks.transfer import judge, lr_sweep
from gdn_mup.errors import UserError

WIDTHS = (32, 64, 128)


def batches() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(32, 6, generator=random) for _ in range(4)]
    return [(x, x.sum(1).gt(0).long()) for x in inputs]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def checked() -> xr.Dataset:
    return coordinate_check(Mlp, WIDTHS, batches(), loss=loss, steps=(1, 3), seeds=(0, 1))


def test_everything_is_measured_at_every_width_seed_and_step(checked):
    assert dict(checked.sizes) == {"seed": 2, "width": 3, "step": 3, "module": 5, "parameter": 7}
    assert list(checked.step.values) == [0, 1, 3]
    assert list(checked.module.values) == ["input", "hidden", "narrow", "readout", "(model)"]
    assert not checked.rms.isnull().any() and (checked.change.sel(step=0) == 0).all()
    assert checked.update_rms.sel(step=0).isnull().all() and not checked.update_rms.sel(step=3).isnull().any()
    assert all(variable.attrs["units"] and variable.attrs["long_name"] for variable in checked.data_vars.values())
    # AdamW's first update is its learning rate; the rule's is a multiple of the base width's.
    rates = checked.learning_rate / checked.learning_rate.sel(width=32)
    xr.testing.assert_allclose(rates, checked.rule_learning_rate)
    first = checked.update_rms.sel(step=1, parameter="hidden.weight") / checked.learning_rate.sel(
        parameter="hidden.weight"
    )
    assert np.allclose(first, 1, rtol=0.01)


def test_exponents_are_those_of_theory(checked):
    at_init = dict(zip(checked.module.values, exponents(checked.sel(step=0), "rms").value, strict=True))
    assert at_init["hidden"] == pytest.approx(0, abs=0.1) and at_init["readout"] < -0.2
    assert findings(checked) == []


def test_an_output_that_is_the_same_at_every_step_is_no_finding():
    class Rotary(Mlp):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.constant = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.constant(torch.ones(4))
            return super().forward(x)

    assert findings(coordinate_check(Rotary, (32, 64), batches(), loss=loss, seeds=(0, 1))) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (32,)}, r"widths: \[32\]: give two or more"),
        ({"batches": []}, "batches: none"),
        ({"batches": [{}], "loss": None}, "loss: None: the model returns none"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    class Silent(Mlp):
        def forward(self, x: Tensor | None = None) -> None:
            return None

    call = {"widths": WIDTHS, "batches": batches(), "loss": loss} | arguments
    with pytest.raises(UserError, match=message):
        coordinate_check(Silent, **call)


# Transfer.


def sweep(moves: float) -> xr.Dataset:
    """Parabolas of log₂ learning rate, with little noise, whose minimum moves between two widths."""
    rates = np.arange(-9.0, -2.9, 0.5)
    noise = np.random.default_rng(0).normal(0, 0.0005, (3, 2, len(rates)))
    best = np.array([-6.0, -6.0 + moves])[:, None]
    losses = 2 + 0.03 * (rates - best) ** 2 + noise
    coordinates = {"seed": [0, 1, 2], "width": [64, 256], "learning_rate": 2.0**rates}
    return xr.Dataset({"train_loss": (("seed", "width", "learning_rate"), losses)}, coords=coordinates)


@pytest.mark.parametrize(("moves", "text"), [(0.0, "it stays"), (-2.0, "it moves")])
def test_the_report_says_whether_the_optimum_moved(moves, text):
    verdict = judge(sweep(moves))
    assert verdict.text == text
    assert verdict.move == pytest.approx(moves, abs=0.3) and moves in verdict.interval


def test_an_optimum_at_the_edge_is_no_number():
    dataset = sweep(0.0).isel(learning_rate=slice(6, None))
    assert judge(dataset).text.startswith("cannot be said") and np.isnan(judge(dataset).move)


def test_diverged_runs_have_no_loss():
    rates = [2.0**-9, 2.0**-7, 2.0**-5, 2.0**12]
    dataset = lr_sweep(Mlp, (32, 64), batches(), rates, loss=loss, steps=10, seeds=(0,))
    assert dataset.train_loss.isel(learning_rate=-1).isnull().all()
    assert not dataset.train_loss.isel(learning_rate=slice(3)).isnull().any()


# The command line.

MINE = """
import torch
from command_line import gdn_mup
from module_examples import Mlp
from test_checks import batches, loss

def unscaled(width):
    model = Mlp(width)
    model.narrow.register_forward_hook(lambda module, args, output: output * width)
    return model
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "mine.py").write_text(MINE)
    tests = str(Path(__file__).parent)
    code = f"import sys; sys.path.append({tests!r}); from gdn_mup.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True)


def test_check_writes_its_dataset_and_figure_and_says_by_its_exit_code_whether_something_is_off(tmp_path: Path):
    right = run(tmp_path, "check", "mine:Mlp", "--widths", "32", "64", "128", "--seeds", "2", "--output", "out")
    assert right.returncode == 0, right.stderr
    assert right.stdout.splitlines()[-1] == "0 findings in 5 outputs and 7 parameters"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"coordinates.{s}" for s in ("nc", "svg", "png", "csv")
    }
    with xr.open_dataset(tmp_path / "out" / "coordinates.nc") as dataset:
        assert list(dataset.width.values) == [32, 64, 128]
    wrong = run(tmp_path, "check", "mine:unscaled", "--widths", "32", "64", "128", "--seeds", "2")
    assert wrong.returncode == 1
    assert "narrow: output at init ∝ width^+" in wrong.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine:absent", "--widths", "32", "64"], "error: mine:absent: mine has no function 'absent'"),
        (["nowhere:f", "--widths", "32", "64"], "error: nowhere:f: No module named 'nowhere'"),
        (["mine:Mlp", "--widths", "32", "wide"], "error: --widths: wide: use whole numbers"),
        (["mine:Mlp", "--widths", "32"], "error: widths: [32]: give two or more"),
    ],
)
def test_wrong_commands_are_named_in_one_line(arguments, message, tmp_path: Path):
    (tmp_path / "mine.py").write_text(MINE)
    done = gdn_mup("check", *arguments, folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_transfer_prints_every_optimum_and_the_move(tmp_path: Path):
    arguments = ["--widths", "16", "32", "--steps", "10", "--seeds", "2", "--log2-first", "-9", "--log2-last", "-3"]
    done = run(tmp_path, "transfer", "mine:Mlp", *arguments, "--output", "sweep.nc")
    assert done.returncode in (0, 1), done.stderr
    first, second, verdict = done.stdout.splitlines()
    assert first.startswith("width 16: ") and second.startswith("width 32: ")
    assert verdict.startswith("the best learning rate: ")
    assert (tmp_path / "sweep.nc").exists()


def test_a_grid_of_learning_rates_ends_where_it_says() -> None:
    assert _learning_rates(-12, -4, 1) == [2.0**power for power in range(-12, -3)]
    with pytest.raises(UserError, match="--step 3: steps of 3 from log2_first -12 miss log2_last -4; end at -6 or -3"):
        _learning_rates(-12, -4, 3)
    with pytest.raises(UserError, match="the grid falls"):
        _learning_rates(-4, -12, 1)
