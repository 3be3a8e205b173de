"""Figure of transfer over training: slope and regret of the learning rate at every held-out evaluation."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from gdn_mup.errors import UserError
from gdn_mup.study.estimates import Estimate
from gdn_mup.study.figures.growth import regret_range, regrets_against
from gdn_mup.study.figures.style import (
    FULL_WIDTH,
    RULE_COLOURS,
    RULE_MARKERS,
    Drawing,
    distinct,
    label_below,
    legend,
    letters,
    panel_title,
    rule_keys,
    styled,
    title,
    unbroken,
)
from gdn_mup.study.figures.transfer import regret_text
from gdn_mup.study.optimum import Transfer, evaluation_steps, transfers
from gdn_mup.study.titles import GROWTH_TITLES, OPTIMIZER_TITLES, RULE_TITLES, named

_SHIFT = 0.05  # of the time between evaluations, from one rule set to the next

Place = tuple[str, str, str]  # growth, optimizer and rule set
Evaluations = dict[int, Transfer]  # the estimates of one place, by updates done


@styled
def transfer_over_training(dataset: xr.Dataset) -> Drawing:
    """Slope of the optimum and regret at the widest width against updates done, a line per rule set.

    A row per (growth, optimizer), of those that were evaluated more than once after init. Every evaluation is treated
    as if training ended with it: learning rates that have diverged by then bound the curve. Bars are 95 % intervals. A
    cross at the top edge says that training diverges at the transferred learning rate. The table has one row per rule
    set and evaluation. Raises UserError if no sweep was evaluated twice.
    """
    sweeps = _by_evaluation(dataset)
    rows = distinct((growth, optimizer) for growth, optimizer, _ in sweeps)
    size = (FULL_WIDTH, 0.9 + 1.5 * len(rows))
    figure, axes = plt.subplots(len(rows), 2, figsize=size, squeeze=False, sharex="row")
    letter = letters()
    for (growth, optimizer), (left, right) in zip(rows, axes, strict=True):
        here = [each for key, each in sweeps.items() if key[:2] == (growth, optimizer)]
        steps = distinct(step for each in here for step in each)
        floor, ceiling = regret_range([_regret(s) for each in here for s in each.values()])
        for k, each in enumerate(here):
            x = np.array(list(each)) + _SHIFT * float(np.diff(steps).min()) * (k - (len(here) - 1) / 2)
            _slopes_against(left, x, list(each.values()))
            regrets_against(right, x, [_regret(s) for s in each.values()], _last(each).rules, ceiling)
        for ax in (left, right):
            ax.margins(x=0.13)  # room beside the first evaluation for where its interval ends
        left.axhline(0, color="0.4", lw=0.8, ls=(0, (4, 2)), zorder=1)
        left.xaxis.set_major_locator(FixedLocator(steps, nbins=8))
        right.set_ylim(floor, ceiling)
        width = max(s.widths[-1] for each in here for s in each.values())
        left.set_ylabel("octaves per doubling")
        right.set_ylabel("transfer regret\n(nats/token)")
        panel_title(left, next(letter), f"{OPTIMIZER_TITLES[optimizer]}, {GROWTH_TITLES[growth]}: slope")
        panel_title(right, next(letter), f"regret at width {width}")
    label_below(axes, "updates")
    title(figure, _finding(sweeps))
    rules = [name for name in RULE_TITLES if name in {key[-1] for key in sweeps}]
    handles = rule_keys(rules)
    handles.append(Line2D([], [], color="0.3", marker="|", ls="none", ms=9, label="95 % interval"))
    if any(np.isinf(_regret(s).value) for each in sweeps.values() for s in each.values()):
        handles.append(Line2D([], [], color="0.3", marker="x", ls="none", mew=1.2, ms=5, label="diverges"))
    legend(figure, handles)
    return Drawing(figure, _table(sweeps.values()))


def _by_evaluation(dataset: xr.Dataset) -> dict[Place, Evaluations]:
    """The estimates of every sweep that was evaluated more than once after init."""
    found: dict[Place, Evaluations] = {}
    final = transfers(dataset)
    for growth, optimizer in distinct((s.growth, s.optimizer) for s in final):
        _, *earlier, last = evaluation_steps(dataset, growth, optimizer)
        for step in [*earlier, last] if earlier else []:
            for sweep in transfers(dataset, optimizer, growth, step) if step != last else final:
                if (sweep.growth, sweep.optimizer) == (growth, optimizer):
                    found.setdefault((growth, optimizer, sweep.rules), {})[step] = sweep
    if not found:
        raise UserError(
            "no learning-rate sweep was evaluated more than once after init; in the study file make "
            "`training.evaluate_every` less than `training.steps`, and run it"
        )
    return found


def _slopes_against(ax: Axes, x: np.ndarray, sweeps: Sequence[Transfer]) -> None:
    """Slopes of one rule set at places `x` [sweeps]; where one has no number, the line is broken."""
    colour, marker = RULE_COLOURS[sweeps[0].rules], RULE_MARKERS[sweeps[0].rules]
    ax.plot(x, [s.slope.value for s in sweeps], color=colour, lw=1, marker=marker, mec="white", mew=0.5, ms=5, zorder=3)
    ax.vlines(x, *np.transpose([s.slope.interval for s in sweeps]), color=colour, lw=1.4, zorder=2)


def _finding(sweeps: Mapping[Place, Evaluations]) -> str:
    """Whose optimum moves with width at the end, and whose did earlier; the largest regret at the end."""
    last = {place: _last(each) for place, each in sweeps.items()}
    now = [place for place, sweep in last.items() if _moves(sweep)]
    earlier = [place for place, each in sweeps.items() if any(_moves(s) for s in list(each.values())[:-1])]
    found = {
        "at the end as earlier": [place for place in now if place in earlier],
        "only at the end": [place for place in now if place not in earlier],
        "only earlier": [place for place in earlier if place not in now],
    }
    lines = ["Whose optimum moves with width in the course of training"]
    if not now:
        unknown = all(sweep.slope.reason for sweep in last.values())
        lines.append(f"at the end: {'bracketed at too few widths to say' if unknown else 'no movement established'}")
    lines += [f"{when}: {_named(places)}" for when, places in found.items() if places]
    regrets = {place: _regret(sweep) for place, sweep in last.items()}
    largest = max((regret.value for regret in regrets.values() if not regret.reason), default=np.nan)
    worst = [place for place, regret in regrets.items() if regret.value == largest]
    if worst:
        width, text = last[worst[0]].widths[-1], regret_text(regrets[worst[0]])
        lines.append(f"Largest final regret in nats, at width {width}: {_named(worst)}, {unbroken(text)}")
    return "\n".join(lines)


def _moves(sweep: Transfer) -> bool:
    return not sweep.slope.reason and 0.0 not in sweep.slope.interval


def _last(each: Evaluations) -> Transfer:
    return list(each.values())[-1]


def _regret(sweep: Transfer) -> Estimate:
    return sweep.regrets[sweep.widths[-1]]


def _named(places: Iterable[Place]) -> str:
    """Places in words; ways to grow of which the same is true stand together."""
    by_growth: dict[str, list[tuple[str, str]]] = {}
    for growth, optimizer, rules in places:
        by_growth.setdefault(growth, []).append((optimizer, rules))
    growths: dict[str, list[str]] = {}
    for growth, pairs in by_growth.items():
        growths.setdefault(named(pairs), []).append(GROWTH_TITLES[growth])
    return "; ".join(f"{who} by {' and '.join(names)}" for who, names in growths.items())


def _table(sweeps: Iterable[Evaluations]) -> pd.DataFrame:
    rows = []
    for each in sweeps:
        for step, sweep in each.items():
            slope, regret = sweep.slope, _regret(sweep)
            rows.append(
                {
                    "growth": sweep.growth,
                    "optimizer": sweep.optimizer,
                    "rules": sweep.rules,
                    "step": step,
                    "slope": slope.value,
                    "slope_low": slope.interval.low,
                    "slope_high": slope.interval.high,
                    "no_slope": slope.reason,
                    "width": sweep.widths[-1],
                    "transfer_regret": regret.value,
                    "regret_low": regret.interval.low,
                    "regret_high": regret.interval.high,
                    "no_regret": regret.reason,
                }
            )
    return pd.DataFrame(rows)
