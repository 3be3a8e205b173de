"""`gdn-mup check` and `gdn-mup transfer`: a model of one's own from the command line."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from gdn_mup.errors import UserError

if TYPE_CHECKING:
    from torch import nn

EXIT_FOUND = 1
_SEQUENCES, _TOKENS, _BATCHES = 4, 64, 8

Target = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="From a width to the model. In the same module, `batches` (a list, or a function that returns one), "
        "`loss(model, batch)` and `options` (a dict, for `Scaling.between`) are used if they are there.",
    ),
]
Widths = Annotated[int, typer.Option("--widths", help="Widths, the least first: --widths 128 256 512 1024.")]
Seeds = Annotated[int, typer.Option(min=1, help="Seeds of the init.")]
MORE_WIDTHS = {"allow_extra_args": True, "ignore_unknown_options": False}


class _Subject(NamedTuple):
    make_model: Any
    batches: list[Any]
    loss: Any
    options: dict[str, Any]


def check(
    context: typer.Context,
    target: Target,
    widths: Widths,
    learning_rate: Annotated[float, typer.Option(help="At the least width.")] = 2.0**-8,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 4,
    seeds: Seeds = 3,
    output: Annotated[Path | None, typer.Option(help="Folder for coordinates.nc and the figure.")] = None,
) -> None:
    """Check the coordinates of your own model under the rules; exit code 1 if something is off."""
    from gdn_mup.checks.coordinates import coordinate_check
    from gdn_mup.checks.findings import findings
    from gdn_mup.files import replacing

    all_widths = _all_widths(context, widths)
    subject = _subject(target, widths, steps)
    dataset = coordinate_check(
        subject.make_model,
        all_widths,
        subject.batches,
        loss=subject.loss,
        learning_rate=learning_rate,
        steps=sorted({1, steps}),
        seeds=range(seeds),
        **subject.options,
    )
    if output is not None:
        with replacing(output / "coordinates.nc") as path:
            dataset.to_netcdf(path, engine="h5netcdf")
        try:
            from gdn_mup.checks.figure import draw_check
            from gdn_mup.study.figures.style import save
        except ImportError as error:
            raise UserError(f"--output: the figure needs {error.name}: pip install 'gdn-mup[workflow]'") from None
        save(*draw_check(dataset), output / "coordinates")
    found = findings(dataset)
    for finding in found:
        print(finding)
    sizes = dataset.sizes
    print(f"{len(found)} findings in {sizes['module']} outputs and {sizes['parameter']} parameters")
    raise typer.Exit(EXIT_FOUND if found else 0)


def transfer(
    context: typer.Context,
    target: Target,
    widths: Widths,
    log2_first: Annotated[float, typer.Option(help="log₂ of the lowest learning rate.")] = -12,
    log2_last: Annotated[float, typer.Option(help="log₂ of the highest.")] = -4,
    step: Annotated[float, typer.Option(help="Octaves between learning rates.")] = 1.0,
    steps: Annotated[int, typer.Option(min=10, help="Updates.")] = 100,
    seeds: Seeds = 3,
    output: Annotated[Path | None, typer.Option(help="File for the losses, netCDF.")] = None,
) -> None:
    """Sweep the learning rate of your own model at two widths or more; exit code 1 if it does not transfer."""
    import numpy as np

    from gdn_mup.checks.transfer import judge, lr_sweep
    from gdn_mup.files import replacing
    from gdn_mup.study.estimates import Estimate

    all_widths = _all_widths(context, widths)
    subject = _subject(target, widths, steps)
    rates = _learning_rates(log2_first, log2_last, step)
    dataset = lr_sweep(
        subject.make_model,
        all_widths,
        subject.batches,
        rates,
        loss=subject.loss,
        steps=steps,
        seeds=range(seeds),
        **subject.options,
    )
    if output is not None:
        with replacing(output) as path:
            dataset.to_netcdf(path, engine="h5netcdf")
    verdict = judge(dataset)
    for width, optimum in verdict.optima.items():
        best = Estimate(optimum.log2_learning_rate, optimum.interval).plain(2)
        print(f"width {width}: {optimum.reason or f'best at 2^{best}'}")
    print(f"the best learning rate: {verdict.text}{'' if np.isnan(verdict.move) else f' ({verdict.reason})'}")
    raise typer.Exit(EXIT_FOUND if verdict.verdict == "not reproduced" else 0)


def _learning_rates(first: float, last: float, step: float) -> list[float]:
    """Ascending, from 2^first to 2^last."""
    from pydantic import ValidationError

    from gdn_mup.study.plan import LearningRateGrid

    try:
        return list(LearningRateGrid(log2_first=first, log2_last=last, log2_step=step).values)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--log2-first {first:g} --log2-last {last:g} --step {step:g}: {said}") from None


def _all_widths(context: typer.Context, first: int) -> list[int]:
    try:
        return [first, *map(int, context.args)]
    except ValueError:
        raise UserError(f"--widths: {' '.join(context.args)}: use whole numbers") from None


def _subject(target: str, width: int, updates: int) -> _Subject:
    """What the module of a user provides; of its batches, as many as there are updates."""
    import inspect

    from gdn_mup.modules.scaling import Scaling
    from gdn_mup.modules.users import users

    name, _, function = target.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    if not name or importlib.util.find_spec(name.partition(".")[0]) is None:
        raise UserError(
            f"{target}: No module named {name!r}: name a module that imports from here, as my_model:make_model"
        )
    with users(target):
        module = importlib.import_module(name)
    make_model = getattr(module, function, None)
    if not callable(make_model):
        raise UserError(f"{target}: {name} has no function {function!r}: use MODULE:FUNCTION")
    batches = getattr(module, "batches", None)
    if batches is None:
        with users(f"make_model({width})"):
            model = make_model(width)
        batches = _random_tokens(model, target)
        print("batches: random tokens, since the module has none")
    with users(f"{name}.batches"):
        batches = list(islice(batches() if callable(batches) else batches, updates))
    options = getattr(module, "options", {})
    if not isinstance(options, Mapping):
        raise UserError(f"{name}.options: {type(options).__name__}: use a dict of arguments of Scaling.between")
    known = inspect.signature(Scaling.between).parameters.keys() - {"make_model", "base", "target"}
    for key in options.keys() - known:
        raise UserError(f"{name}.options: {key}: unknown; there are {', '.join(sorted(known))}")
    return _Subject(make_model, batches, getattr(module, "loss", None), dict(options))


def _random_tokens(model: "nn.Module", target: str) -> list[Any]:
    import torch

    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise UserError(f"{target}: its module has no `batches`, and the model no config.vocab_size: add `batches`")
    random, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    return [torch.randint(vocabulary, (_SEQUENCES, _TOKENS), generator=random).to(device) for _ in range(_BATCHES)]
