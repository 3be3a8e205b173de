"""What a coordinate check sees, and what it makes of code that is not ours."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import gdn_mup
from module_examples import Mlp
from reliability import ends_as, is_said_as
from torch import Tensor, nn
from torch.nn import functional

from gdn_mup import Scaling, coordinate_check
from gdn_mup.checks.findings import Finding, findings
from gdn_mup.checks.transfer import lr_sweep
from gdn_mup.errors import UserError

WIDTHS = (64, 128, 256)
TOKENS = 64


def batches() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    ids, others = (torch.randint(TOKENS, (4, 16), generator=random) for _ in range(2))
    return [{"input_ids": ids, "labels": others}] * 4


def found(make: Callable[[int], nn.Module], data: Any = None, **options: Any) -> list[Finding]:
    torch.manual_seed(0)
    options = {"seeds": (0, 1)} | options
    return findings(coordinate_check(make, WIDTHS, batches() if data is None else data, **options))


def cross_entropy(logits: Tensor, labels: Tensor) -> SimpleNamespace:
    return SimpleNamespace(loss=functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


# What is no module, and no tensor.


class Around(nn.Module):
    """Logits by a function of the embedding: no readout has a line of its own, and none a multiplier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, width)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        return cross_entropy(functional.linear(self.embed(input_ids), self.embed.weight), labels)


def test_a_loss_that_scales_with_width_is_found_and_points_to_the_weight_behind_it():
    (finding,) = [f for f in found(Around) if f.where == "(loss)"]
    assert "embed.weight, which is used outside its module" in finding.look_at
    assert finding.what == "loss at init" and finding.exponent == pytest.approx(1, abs=0.1)


class Sharing(nn.Module):
    """An autoencoder whose decoder is the encoder's matrix, transposed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder, self.activation = nn.Linear(32, width), nn.ReLU()
        self.decoder = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.encoder(x))
        return self.decoder(functional.linear(h, self.encoder.weight.t()))


def test_a_matrix_that_is_used_twice_is_named():
    data = [torch.randn(16, 32, generator=torch.Generator().manual_seed(0))] * 4
    named = {f.where: f.look_at for f in found(Sharing, data, loss=lambda m, x: (m(x) - x).square().mean())}
    assert "encoder.weight, which is used outside its module" in named["decoder"]


WRAPPED = [
    lambda h: {"h": h},
    lambda h: [h],
    lambda h: (h, h),
    lambda h: (None, h * 1),
    lambda h: SimpleNamespace(h=h),
    lambda h: {"deep": [(h,)]},
]


@pytest.mark.parametrize("wrap", WRAPPED, ids=["dict", "list", "tuple", "second", "object", "nested"])
def test_outputs_of_every_kind_are_seen(wrap):
    class Branch(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.g = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Any:
            return wrap(x * self.g * self.g.numel() ** 0.5)

    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.e, self.b, self.unused = nn.Embedding(TOKENS, width), Branch(width), nn.Linear(width, width)

        def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
            h = self.b(self.e(input_ids))
            while not isinstance(h, Tensor):
                values = (
                    list(h.values()) if isinstance(h, dict) else h if isinstance(h, list | tuple) else [vars(h)["h"]]
                )
                h = next(value for value in values if value is not None)
            return cross_entropy(functional.linear(h, self.e.weight) / h.shape[-1], labels)

    named = [f.where for f in found(Net)]
    assert any(name.partition("[")[0] == "b" for name in named)
    assert {"unused.weight", "unused.bias"} <= set(named)


def test_the_second_output_of_several_has_a_line_of_its_own():
    class Two(Mlp):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.pair(x)
            return super().forward(first + 0 * second)

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, 2 * x

    data = [torch.randn(8, 6)] * 2
    dataset = coordinate_check(Two, (32, 64), data, loss=lambda m, x: m(x).square().mean(), seeds=(0,), steps=(1,))
    assert "pair" in dataset.module.values and "pair[1]" in dataset.module.values
    ratio = dataset.rms.sel(module="pair[1]") / dataset.rms.sel(module="pair")
    assert float(ratio.min()) == pytest.approx(2) == pytest.approx(float(ratio.max()))


def test_modules_that_see_other_tokens_every_time_are_measured_where_they_can_be():
    class Routed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(TOKENS, width), nn.Linear(width, TOKENS)
            self.router, self.expert = nn.Linear(width, 2, bias=False), nn.Linear(width, width)

        def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
            h = self.embed(input_ids).flatten(0, 1)
            chosen = self.router(h).argmax(-1) == 0
            h = h.index_put((chosen.nonzero()[:, 0],), h[chosen] + self.expert(h[chosen]))
            return cross_entropy(self.head(h)[None], labels)

    dataset = coordinate_check(Routed, WIDTHS, batches(), learning_rate=0.05)
    assert "expert" in dataset.module.values
    findings(dataset)


# Readouts that are not called, weights that are not trained.


class Fused(nn.Module):
    """The loss goes around the tied readout, which evaluation calls."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, width), nn.Linear(width, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        h = self.embed(input_ids)
        if labels is None:
            return self.head(h)
        return cross_entropy(functional.linear(h, self.head.weight), labels)


def test_a_loss_around_a_tied_readout_is_named():
    with pytest.raises(UserError) as error:
        found(Fused)
    is_said_as(error.value, "a loss that goes around a tied readout")


def test_a_model_that_leaves_a_rule_open_is_refused_with_a_cure():
    class Bare(Mlp):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.mixing = nn.Parameter(torch.zeros(width, width))

    with pytest.raises(UserError, match=r"mixing: .*axes=\{'mixing': 'out in'\}") as error:
        found(Bare)
    is_said_as(error.value, "a model that leaves a rule open")


def test_a_readout_that_no_pass_uses_gets_no_gradient():
    class Unused(Around):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.head, self.readout = nn.Linear(width, TOKENS), nn.Linear(width, TOKENS)

        def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
            return cross_entropy(self.readout(self.embed(input_ids)), labels)

    assert [(f.where, f.what) for f in found(Unused)] == [(f"head.{p}", "gets no gradient") for p in ("weight", "bias")]


def test_a_zero_readout_does_not_make_the_rest_untrained():
    class Zero(Mlp):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            nn.init.zeros_(self.readout.weight)

    data = [(torch.randn(32, 6), torch.randint(5, (32,)))] * 2
    for steps in ((1,), (1, 2)):
        named = found(Zero, data, loss=lambda m, b: functional.cross_entropy(m(b[0]), b[1]), steps=steps)
        assert not [f for f in named if "gradient" in f.what]


class Adapted(nn.Module):
    """A low-rank pair on frozen layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inp, self.base, self.out = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 5)
        self.A, self.B = nn.Linear(width, 8, bias=False), nn.Linear(8, width, bias=False)
        for layer in (self.inp, self.base, self.out):
            layer.requires_grad_(False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.inp(x))
        return self.out(torch.relu(self.base(h) + self.B(self.A(h))))


def test_nothing_is_found_about_what_is_frozen_or_about_a_low_rank_pair():
    random = torch.Generator().manual_seed(0)
    data = [(torch.randn(32, 6, generator=random), torch.randint(5, (32,), generator=random)) for _ in range(4)]
    assert found(Adapted, data, loss=lambda m, b: functional.cross_entropy(m(b[0]), b[1]), seeds=(0, 1, 2)) == []


# Factors of a model's own.


class Scaled(nn.Embedding):
    """Gemma's: times the root of the width."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embedding_dim**0.5


def test_a_factor_in_a_modules_own_code_is_said_and_its_cure_works_when_pasted():
    make = lambda w: nn.Sequential(Scaled(TOKENS, w), nn.LayerNorm(w), nn.Linear(w, TOKENS))  # noqa: E731
    data = [batch["input_ids"] for batch in batches()]
    loss = lambda m, b: functional.cross_entropy(m(b).flatten(0, 1), b.flatten())  # noqa: E731
    (finding,) = found(make, data, loss=loss)
    assert finding.where == "0" and "a factor ∝ width^+0.5 in the module's own code" in finding.look_at
    pasted = re.search(r"output_multipliers=(\{.*\})", finding.look_at)[1]
    assert found(make, data, loss=loss, output_multipliers=eval(pasted)) == []
    assert Scaling.between(make, 64, 256, output_multipliers=eval(pasted)).outputs == {"0": 0.5}


def test_a_factor_before_a_readout_is_said():
    class Model(nn.Module):
        """T5's: the decoder's output is scaled before a tied readout."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(256, width), nn.LayerNorm(width), nn.Linear(width, 256)
            self.head.weight = self.embed.weight

        def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
            h = self.norm(self.embed(input_ids))
            return cross_entropy(self.head(h * h.shape[-1] ** -0.5), labels)

    named = {f.where: f.look_at for f in found(Model)}
    assert "what it reads, ∝ width^-0.50 (a factor in the model's own code?)" in named["head"]


# Numbers of other kinds, and rates that change.


def test_complex_weights_are_measured_by_their_absolute_value(recwarn):
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.f, self.o = nn.Linear(4, width), nn.Linear(width, 2)
            self.m = nn.Parameter(torch.randn(width, width, dtype=torch.cfloat) / width**0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.o((self.f(x).to(torch.cfloat) @ self.m).abs())

    data, axes = [torch.randn(8, 4)] * 2, {"m": "in out"}
    dataset = coordinate_check(Net, WIDTHS, data, loss=lambda m, x: m(x).square().mean(), axes=axes, seeds=(0, 1))
    sizes = dataset.weight_rms.sel(parameter="m", step=0).mean("seed") * dataset.width**0.5
    assert sizes.values == pytest.approx(1, rel=0.05)
    assert not [w for w in recwarn if "Casting complex" in str(w.message)]
    assert not [f for f in findings(dataset) if f.where == "m"]


def test_a_sparse_embedding_is_named_for_adamw_and_checked_with_sgd():
    make = lambda w: nn.Sequential(nn.Embedding(8, w, sparse=True), nn.Linear(w, 8))  # noqa: E731
    data = [torch.randint(8, (4, 8))] * 2
    options = {"loss": lambda m, b: functional.cross_entropy(m(b).flatten(0, 1), b.flatten()), "seeds": (0,)}
    with pytest.raises(UserError, match="0: sparse: True: AdamW takes no sparse gradients: use sparse=False"):
        coordinate_check(make, (32, 64), data, **options)

    def setup(model: nn.Module, scaling: Scaling) -> torch.optim.Optimizer:
        scaling.initialize(model)
        return torch.optim.SGD(scaling.parameter_groups(model, "sgd", 0.1))

    dataset = coordinate_check(make, (32, 64), data, setup=setup, **options)
    assert float(dataset.gradient_rms.sel(parameter="0.weight", step=1).min()) > 0


def test_a_learning_rate_that_is_overwritten_later_is_found():
    def setup(model: nn.Module, scaling: Scaling) -> torch.optim.Optimizer:
        scaling.initialize(model)
        optimizer = torch.optim.AdamW(scaling.parameter_groups(model, "adamw", 2.0**-8))

        def overwrite(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 2.0**-8

        optimizer.register_step_post_hook(overwrite)
        return optimizer

    data = [(torch.randn(32, 6), torch.randint(5, (32,)))] * 4
    named = found(Mlp, data, loss=lambda m, b: functional.cross_entropy(m(b[0]), b[1]), setup=setup)
    late = {f.where for f in named if f.what == "learning rate at the last update over what the rule says"}
    assert late == {"hidden.weight", "narrow.weight", "readout.weight"}


# Code of the user's own.


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(32, 6, generator=random), torch.randint(5, (32,), generator=random)


def test_of_endless_batches_as_many_are_taken_as_there_are_updates():
    loss = lambda m, b: functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    taken = []
    data = (taken.append(batch) or batch for batch in endless())
    coordinate_check(Mlp, (32, 64), data, loss=loss, seeds=(0,), steps=(1, 3))
    assert len(taken) == 3
    lr_sweep(Mlp, (32, 64), endless(), [2.0**k for k in range(-9, -5)], loss=loss, steps=10, seeds=(0,))
    for call in (lambda: coordinate_check(Mlp, (32, 64), iter([])), lambda: lr_sweep(Mlp, (32, 64), [], [1.0] * 4)):
        with pytest.raises(UserError, match="batches: none: give one or more"):
            call()


def raising(*_: Any) -> Any:
    raise ValueError("a mistake of mine")


@pytest.mark.parametrize("where", ["loss", "setup", "make_model", "batches"])
def test_errors_in_the_users_own_code_are_lines_with_a_place(where):
    def some() -> Iterator[Any]:
        yield from [(torch.randn(8, 6), torch.randint(5, (8,)))]
        if where == "batches":
            raising()

    options: dict[str, Any] = {"loss": lambda m, b: functional.cross_entropy(m(b[0]), b[1])}
    options |= {where: raising} if where in ("loss", "setup") else {}
    make = raising if where == "make_model" else Mlp
    with pytest.raises(UserError, match=rf"{where}.*: ValueError: a mistake of mine \(.*test_checks_faults\.py:\d+\)$"):
        coordinate_check(make, (32, 64), some(), **options)


def test_a_loss_is_one_number():
    data = [torch.randn(8, 6)]
    for loss, said in ((lambda m, b: m(b), r"\[8, 5\]"), (lambda m, b: 3.0, "float")):
        with pytest.raises(UserError, match=f"loss: returned {said}: return one number"):
            coordinate_check(Mlp, (32, 64), data, loss=loss)


def test_a_machine_that_fails_is_no_mistake_of_the_users():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        coordinate_check(Mlp, (32, 64), [torch.randn(8, 6)], loss=loss)


# The command line.

RIGHT = """
import itertools, os, sys, torch
from module_examples import Mlp as make_model

def batches():
    return ((torch.randn(8, 6), torch.randint(5, (8,))) for _ in itertools.count())

def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
"""
BROKEN = {
    "an error while it is imported": RIGHT + "\nundefined\n",
    "a mistake of syntax": RIGHT + "\ndef f(:\n",
    "a package that is not there": "import a_package_that_is_not_there\n" + RIGHT,
    "an exit": RIGHT + "\nsys.exit(1)\n",
    "an exit without a word": RIGHT + "\nraise SystemExit\n",
    "an error in make_model": RIGHT + "\ndef make_model(width):\n    return [][width]\n",
    "an exit in make_model": RIGHT + "\ndef make_model(width):\n    sys.exit(1)\n",
    "an error in batches": RIGHT + "\ndef batches():\n    yield 1 / 0\n",
    "an error in loss": RIGHT + "\ndef loss(model, batch):\n    return model(batch[1])\n",
    "a file that is not there": RIGHT + "\ndef batches():\n    return open('nowhere.bin')\n",
    "no loss": RIGHT + "\ndef loss(model, batch):\n    return None\n",
    "options that are none": RIGHT + "\noptions = {'axis': {}}\n",
    "options of another kind": RIGHT + "\noptions = 3\n",
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A command on a module of one's own."""

    def command(name: str, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "mine.py").write_text(module)
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        importlib.invalidate_caches()
        widths = ["--widths", "16", "32", "--seeds", "1"]
        return gdn_mup(name, "mine:make_model", *widths, *arguments, folder=tmp_path)

    return command


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_mistake_in_the_users_module_is_one_line_and_never_the_code_of_a_finding(mistake, run):
    done = run("check", BROKEN[mistake])
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    if "exit" not in mistake and "options" not in mistake and mistake != "no loss":
        assert re.search(r"\.py:\d+\)$", done.stderr.strip())


def test_what_the_page_says_of_the_users_module_is_so(run):
    ends_as(run("check", BROKEN["an error in loss"]), "an error in a module of your own")


@pytest.mark.parametrize("command", ["check", "transfer"])
def test_endless_batches_end(command, run):
    done = run(command, RIGHT, *(["--steps", "10"] if command == "transfer" else []))
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
