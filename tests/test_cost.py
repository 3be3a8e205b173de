"""What things cost: FLOPs are torch's own count, energy is what counters say, and a table's rows add up."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from synthetic import BASE_WIDTH, COSTS, in_memory, job_file, study
from torch.utils.flop_counter import FlopCounterMode

from gdn_mup.errors import UserError
from gdn_mup.model import operations
from gdn_mup.model.config import ModelSettings, ModelShape, model_shape
from gdn_mup.model.flops import forward_flops, training_flops
from gdn_mup.model.language_model import LanguageModel
from gdn_mup.study import datasets
from gdn_mup.study.cost import costs, job_costs, planned_costs, sweep_cost
from gdn_mup.study.plan import load_study
from gdn_mup.study.tables import printed_costs
from gdn_mup.study.titles import with_unit
from gdn_mup.training import energy

# Eight heads: the gates' rows fill the padding of their matrix, so that torch multiplies no zeros.
MODEL = ModelSettings(base_width=32, layers=2, heads=8, head_dim=4, value_head_dim=8, mlp_ratio=2.5)


def counted(shape: ModelShape, tokens: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """FLOPs that torch counts forward and backward, without the delta rule, whose implementation is free."""

    def no_delta_rule(q: Any, k: Any, v: Any, log_decay: Any, beta: Any, **options: Any) -> tuple[Any, None]:
        return v + (q.sum(-1) * k.sum(-1) * log_decay * beta)[..., None], None

    monkeypatch.setattr(operations, "gated_delta_rule", no_delta_rule)
    model = LanguageModel(shape, 1)
    ids = torch.randint(0, shape.vocabulary_size, (2, tokens // 2 + 1))
    with FlopCounterMode(display=False) as forward:
        losses = model.losses(ids)
    with FlopCounterMode(display=False) as backward:
        losses.sum().backward()

    def products(counter: FlopCounterMode) -> int:
        by_operation = counter.get_flop_counts()["Global"]
        return sum(flops for operation, flops in by_operation.items() if "conv" not in str(operation))

    return products(forward), products(backward)


@pytest.mark.parametrize("tied", [False, True])
def test_products_with_weights_are_those_that_torch_counts(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = model_shape(MODEL.model_copy(update={"tied_embeddings": tied}), 64, "head_dim", 320)
    assert (shape.head_dim, shape.value_head_dim, shape.mlp_width) == (8, 16, 160)
    forward, backward = counted(shape, 48, monkeypatch)
    recurrence = shape.layers * 6 * shape.heads * shape.head_dim * shape.value_head_dim
    assert forward == 48 * (forward_flops(shape) - recurrence)
    assert backward == 2 * forward
    assert training_flops(shape) == 3 * forward_flops(shape)


def test_the_recurrence_is_what_torch_counts_of_it_step_by_step() -> None:
    """S kᵀ, v kᵀ and S q as matrix products, for each head and token."""
    keys, values = torch.randn(5, 8, 1), torch.randn(5, 16, 1)
    state = torch.randn(5, 16, 8)
    with FlopCounterMode(display=False) as counter:
        state @ keys
        values @ keys.transpose(1, 2)
        state @ keys
    heads = [model_shape(MODEL.model_copy(update={"heads": n}), 64, "head_dim", 320) for n in (8, 9)]
    gates_and_projections = 2 * 64 * (2 * 8 + 3 * 16 + 2)
    one_head = (forward_flops(heads[1]) - forward_flops(heads[0])) / MODEL.layers - gates_and_projections
    assert counter.get_total_flops() / 5 == one_head


def rapl(folder: Path, zones: dict[str, tuple[str, int]]) -> None:
    """A folder like /sys/class/powercap: zone -> name and microjoules."""
    for zone, (name, energy_uj) in zones.items():
        (folder / zone).mkdir(exist_ok=True)
        (folder / zone / "name").write_text(f"{name}\n")
        (folder / zone / "energy_uj").write_text(f"{energy_uj}\n")
        (folder / zone / "max_energy_range_uj").write_text("100000000\n")


def test_a_processors_packages_are_metered_and_their_counters_may_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    parts = {"intel-rapl:0:0": ("core", 7), "intel-rapl:2": ("psys", 7)}
    rapl(tmp_path, {"intel-rapl:0": ("package-0", 5_000_000), "intel-rapl:1": ("package-1", 90_000_000), **parts})
    meter = energy.Meter("cpu", before=energy.Spent(60.0, 1000.0))
    assert meter.read().joules == 1000
    rapl(tmp_path, {"intel-rapl:0": ("package-0", 8_000_000), "intel-rapl:1": ("package-1", 10_000_000)})
    spent = meter.read()
    assert spent.joules == pytest.approx(1000 + 3 + 20)
    assert 60 <= spent.seconds < 61


def test_what_no_counter_reports_is_not_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert math.isnan(energy.Meter("cpu").read().joules)
    rapl(tmp_path, {"intel-rapl:0": ("package-0", 1)})
    (tmp_path / "intel-rapl:0/energy_uj").unlink()  # as good as unreadable
    assert math.isnan(energy.Meter("cpu", energy.Spent(0.0, 5.0)).read().joules)


class NoDriver(Exception):
    """Stands for NVML's own errors."""


def test_a_gpus_energy_is_nvmls_for_the_device_that_cuda_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    millijoules = {b"GPU-aaaa": 0, b"GPU-bbbb": 2_000}

    def handle(uuid: str) -> bytes:
        if uuid.encode() not in millijoules:
            raise NoDriver
        return uuid.encode()

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=millijoules.__getitem__,
        NVMLError=NoDriver,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="bbbb"))
    meter = energy.Meter("cuda")
    millijoules[b"GPU-bbbb"] += 7_500
    assert meter.read().joules == 7.5
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="cccc"))
    assert math.isnan(energy.Meter("cuda").read().joules)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert math.isnan(energy.Meter("cuda").read().joules)


@pytest.fixture(scope="module")
def evidence() -> dict[str, xr.Dataset]:
    return {kind: in_memory(study(), kind) for kind in ("lr_sweep", "coordinates", "multiplier", "clipping")}  # type: ignore[arg-type]


def test_rows_add_up_and_failed_runs_are_counted(evidence: dict[str, xr.Dataset]) -> None:
    table = costs(evidence)
    total, rows = table.iloc[-1], table.iloc[:-1]
    assert total.kind == "total" and set(rows.kind) == set(evidence)
    for name in ("jobs", "members", "diverged", "tokens", "flops", "seconds", "joules", "jobs_with_joules"):
        assert total[name] == pytest.approx(rows[name].sum()), name
    base = rows[(rows.kind == "lr_sweep") & (rows.optimizer == "adamw") & (rows.width == "32")].iloc[0]
    sweep = evidence["lr_sweep"].sel(optimizer="adamw", width=32)
    assert base.diverged == int(sweep.diverged.sel(rules="sp").sum()) > 0  # all rule sets are one there
    assert base.members == 3 * 19 and base.tokens == 3 * 19 * 60 * 8 * 128
    shape = model_shape(ModelSettings(**study().model.model_dump()), 32, "heads", 512)
    assert base.flops == base.tokens * training_flops(shape) + 3 * 19 * 1000 * forward_flops(shape)
    assert base.seconds == 3 * 12.5 and base.seconds_a_job == 12.5


def test_a_study_that_was_run_is_predicted_to_cost_what_it_cost(evidence: dict[str, xr.Dataset]) -> None:
    plan = study(coordinate_checks=[], multiplier_checks=[], clipping_checks=[], tunings=[])
    _, evaluated = plan.tokens_of(plan.jobs("lr_sweep")[0])
    measured = evidence["lr_sweep"]
    evaluations = measured.evaluated_tokens.where(measured.members.isnull(), evaluated)
    measured = measured.assign(evaluated_tokens=evaluations, joules=measured.seconds * 200)
    order, columns = ["optimizer", "width"], ["jobs", "members", "tokens", "flops", "seconds", "joules"]
    predicted = planned_costs(plan, lambda job: 1 if job.width == BASE_WIDTH else 4, measured).set_index(order)
    cost = costs({"lr_sweep": measured}).set_index(order)
    assert (predicted.loc[cost.index, ["jobs", "members", "tokens", "flops"]] == cost[columns[:4]]).all(axis=None)
    by_width = [table.groupby("width")[columns[4:]].sum() for table in (predicted, cost)]  # optimizers take turns
    np.testing.assert_allclose(by_width[0], by_width[1])


def test_the_speed_of_models_larger_than_measured_is_that_of_the_largest(evidence: dict[str, xr.Dataset]) -> None:
    plan = study(
        sweeps=[
            {"growth": "heads", "optimizer": "adamw", "rules": ["sp"], "widths": [32, 128, 512], "seeds": [0],
             "learning_rates": {"log2_first": -2, "log2_last": -2}}
        ]
    )  # fmt: skip
    table = planned_costs(plan, lambda job: 1, evidence["lr_sweep"])
    sweeps = table[table.kind == "lr_sweep"].set_index("width")
    rate = sweeps.flops / sweeps.seconds
    assert rate["512"] == pytest.approx(rate["128"]) and rate["128"] > 2 * rate["32"]
    with pytest.raises(UserError, match="no job that says how long it took"):
        planned_costs(plan, lambda job: 1, evidence["lr_sweep"].assign(seconds=evidence["lr_sweep"].seconds * np.nan))


def test_studies_of_any_size_add_up(evidence: dict[str, xr.Dataset]) -> None:
    """Beyond the 9 EFLOPs that a 64-bit whole number holds, predicted and measured."""
    paper = load_study(Path(__file__).parents[1] / "config/studies/paper.yaml")
    *rows, total = planned_costs(paper, lambda job: 2, evidence["lr_sweep"]).itertuples()
    assert total.flops == pytest.approx(math.fsum(row.flops for row in rows)) and total.flops > 1e21
    sweep = evidence["lr_sweep"]
    larger = {"lr_sweep": sweep.assign(tokens=sweep.tokens.fillna(0).astype("int64") * 10**8)}
    *rows, total = costs(larger).itertuples()
    assert total.flops == pytest.approx(math.fsum(row.flops for row in rows)) and total.flops > 1e19


def test_energy_that_some_jobs_report_says_how_many(evidence: dict[str, xr.Dataset]) -> None:
    table = costs(evidence)
    printed = printed_costs(table)
    checks = (
        evidence["coordinates"].members.notnull().sum().item() + evidence["multiplier"].members.notnull().sum().item()
    )
    assert table.iloc[-1].joules == COSTS["joules"] * checks
    assert printed.energy.iloc[-1] == f"{COSTS['joules'] * checks:.0f} J (of {checks} jobs)"
    assert printed.energy[printed["jobs of"] == "lr_sweep"].eq("not reported").all()


def test_a_sweep_is_a_share_of_its_job(evidence: dict[str, xr.Dataset]) -> None:
    """Of four rule sets' members at width 64, and of the one that stands for them at the base width."""
    assert sweep_cost(evidence["lr_sweep"], "heads", "adamw", 64, 19).seconds == pytest.approx(12.5 / 4)
    assert sweep_cost(evidence["lr_sweep"], "heads", "adamw", 32, 19).seconds == pytest.approx(12.5)


def test_files_of_before_report_nothing(evidence: dict[str, xr.Dataset], tmp_path: Path) -> None:
    before = evidence["lr_sweep"].drop_vars(["joules", "members", "diverged_members", "evaluated_tokens"])
    datasets.write(before, tmp_path / "lr_sweep.nc")
    read = datasets.open_dataset(tmp_path / "lr_sweep.nc", "lr_sweep")
    assert read.members.isnull().all() and read.members.dims == read.seconds.dims
    assert len(job_costs(read)) == 2 * 3 * 3
    printed = printed_costs(costs({"lr_sweep": read}))
    assert printed.iloc[-1][["runs", "diverged", "FLOPs", "energy"]].eq("not reported").all()
    assert printed.iloc[-1].time == "225 s"


def test_runs_of_a_sweep_of_before_are_counted_by_their_losses(tmp_path: Path) -> None:
    plan = study()
    for job in plan.jobs("lr_sweep")[::4]:
        written = job_file(plan, job)
        written.attrs["settings"] = json.dumps(plan.settings_of(job))
        before = written.drop_vars(["joules", "members", "diverged_members", "evaluated_tokens"])
        if job.width == BASE_WIDTH:
            before["train_loss"] = before.train_loss.sel(rules="sp", drop=True).expand_dims(rules=before.rules)
        datasets.write(before, tmp_path / "job.nc")
        read = datasets.open_job(tmp_path / "job.nc", "lr_sweep")
        assert read.members == written.members and read.diverged_members == written.diverged_members
        assert read.evaluated_tokens == 4 * 4 * 8 * 128 and read.joules.isnull()


def test_nothing_costs_nothing() -> None:
    with pytest.raises(UserError, match="a study without experiments"):
        costs({})


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0, "J", "0 J"),
        (4.512e12, "", "4.51 T"),
        (999.6, "J", "1 kJ"),
        (3210, "s", "3,210 s"),
        (9000, "s", "2.5 h"),
        (1.5e21, "", "1.5 Z"),
        (np.nan, "J", "not reported"),
    ],
)
def test_large_numbers_are_printed_with_prefixes(value: float, unit: str, expected: str) -> None:
    assert with_unit(value, unit) == expected
