"""Members trained together: nobody notices a neighbour, and a killed job goes on where it was."""

import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from reliability import is_logged_as_on_the_page, is_said_as

from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.errors import MachineError
from gdn_mup.model.config import GrowthMode, ModelSettings
from gdn_mup.training.clipping import clip, gradient_norms, norm_weights
from gdn_mup.training.config import OptimizerName, TrainingSettings
from gdn_mup.training.memory import members_that_fit
from gdn_mup.training.schedule import learning_rate_factor
from gdn_mup.training.sweep import Curves, Member, Trainer, distinct_members, members_in_cache, scaled_model, train

MODEL = ModelSettings(base_width=16, layers=2, heads=2, head_dim=8, value_head_dim=8, mlp_ratio=2)
TRAINING = TrainingSettings(
    steps=20, warmup_steps=2, batch_size=2, context_length=32, evaluate_every=5, evaluation_batches=1
)
RULES = ("sp", "mup", "liu_gu", "gdn_mup")


def make_trainer(
    members: Sequence[Member],
    tokens: TokenFile,
    *,
    optimizer: OptimizerName = "adamw",
    width: int = 32,
    growth: GrowthMode = "heads",
    training: TrainingSettings = TRAINING,
    seed: int = 0,
) -> Trainer:
    scaled = scaled_model(MODEL, width, growth, tokens.vocabulary_size, RULES, optimizer)
    return Trainer(members, scaled, MODEL, training, optimizer, seed, tokens)


def run(trainer: Trainer, validation: TokenFile, **options: object) -> Curves:
    """Train the members of one trainer, as one group."""
    members = [Member("", 0.0)] * trainer.model.members  # the trainer knows who they are
    return train(members, lambda _: trainer, len(members), 32, trainer.training, validation, **options)  # type: ignore[arg-type]


def run_in_groups(tokens: TokenFile, validation: TokenFile, size: int, **options: object) -> Curves:
    """Train all MEMBERS in groups of `size`."""
    return train(MEMBERS, lambda group: make_trainer(group, tokens), size, 32, TRAINING, validation, **options)  # type: ignore[arg-type]


MEMBERS = [Member("gdn_mup", 2.0**-e) for e in (9, 7, 5)] + [Member("sp", 2.0**-7)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_member_alone_follows_itself_in_company(
    tokens: TokenFile, validation: TokenFile, optimizer: OptimizerName
) -> None:
    """Within float32 rounding, grown over 20 steps: 1e-4 nats (measured: 4e-5 at most, mostly 1e-6).

    AdamW turns the rounding of gradients near zero into updates of full size, hence more than the last bit.
    """
    together = run(make_trainer(MEMBERS, tokens, optimizer=optimizer), validation)
    for row, member in enumerate(MEMBERS):
        alone = run(make_trainer([member], tokens, optimizer=optimizer), validation)
        np.testing.assert_allclose(alone.train_loss[0], together.train_loss[row], atol=1e-4, rtol=0)
        np.testing.assert_allclose(alone.val_loss[0], together.val_loss[row], atol=1e-4, rtol=0)
        np.testing.assert_allclose(alone.grad_norm[0], together.grad_norm[row], rtol=2e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_member_that_diverges_leaves_its_neighbours_bit_identical(
    tokens: TokenFile, validation: TokenFile, optimizer: OptimizerName
) -> None:
    calm = make_trainer(MEMBERS, tokens, optimizer=optimizer)
    wild = make_trainer(MEMBERS, tokens, optimizer=optimizer)
    update = wild.step

    def step(index: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 1:  # the second member gets an infinite weight: NaN from its second loss on
            with torch.no_grad():
                wild.model.weights["0.mlp_up"][1, 0, 0] = torch.inf
        return update(index, factor)

    wild.step = step  # type: ignore[method-assign]
    expected, found = run(calm, validation), run(wild, validation)
    assert found.diverged[1] and not expected.diverged[1]
    assert np.isnan(found.train_loss[1, 1:]).all() and np.isnan(found.val_loss[1, 1:]).all()
    others = [0, 2, 3]
    for curve in ("train_loss", "val_loss", "grad_norm"):
        np.testing.assert_array_equal(getattr(found, curve)[others], getattr(expected, curve)[others])
    for name, weight in wild.model.weights.items():
        assert torch.equal(weight[others], calm.model.weights[name][others]), name


def test_losses_fall_on_real_text(tokens: TokenFile, validation: TokenFile) -> None:
    curves = run(make_trainer([Member("gdn_mup", 2.0**-5)], tokens), validation)
    assert curves.evaluation_step.tolist() == [0, 5, 10, 15, 20]
    assert curves.val_loss[0, 0] > np.log(tokens.vocabulary_size) - 0.1
    assert curves.val_loss[0, -1] < curves.val_loss[0, 0] - 1
    assert not curves.diverged[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_rule_sets_coincide_at_the_base_width_and_are_trained_once(
    tokens: TokenFile, validation: TokenFile, optimizer: OptimizerName
) -> None:
    scaled = scaled_model(MODEL, 16, "heads", tokens.vocabulary_size, RULES, optimizer)
    members, stands_for = distinct_members(scaled, [0.01, 0.02], "global_norm")
    assert members == [Member("sp", 0.01), Member("sp", 0.02)]
    assert stands_for == dict.fromkeys(RULES, "sp")
    everyone = [Member(rules, 0.01) for rules in RULES]
    curves = run(make_trainer(everyone, tokens, optimizer=optimizer, width=16), validation)
    for row in range(1, len(RULES)):
        np.testing.assert_array_equal(curves.val_loss[row], curves.val_loss[0])


def test_rule_sets_differ_beyond_the_base_width(tokens: TokenFile) -> None:
    scaled = scaled_model(MODEL, 32, "heads", tokens.vocabulary_size, RULES, "sgd")
    _, stands_for = distinct_members(scaled, [0.01], "global_norm")
    assert stands_for == {rules: rules for rules in RULES}


def test_rules_that_differ_in_sgd_alone_are_trained_once_under_adamw(tokens: TokenFile, validation: TokenFile) -> None:
    scaled = scaled_model(MODEL, 32, "heads", tokens.vocabulary_size, RULES, "adamw")
    _, stands_for = distinct_members(scaled, [0.01], "global_norm")
    assert stands_for == {rules: rules for rules in RULES} | {"liu_gu": "mup"}
    curves = run(make_trainer([Member("mup", 0.01), Member("liu_gu", 0.01)], tokens, width=32), validation)
    np.testing.assert_array_equal(*curves.val_loss)
    # The width-invariant norm is weighed by SGD's multipliers: there they clip differently.
    _, stands_for = distinct_members(scaled, [0.01], "width_invariant_norm")
    assert stands_for == {rules: rules for rules in RULES}


class Killed(Exception):
    """Stands for the end of the process."""


def kill_at(last: int) -> Callable[..., None]:
    """A report that ends the process after so many updates, counted over members."""

    def report(done: float, status: str = "") -> None:
        if done == last:
            raise Killed

    return report


def checkpointed(folder: Path) -> dict[str, object]:
    """A checkpoint and a report after every step."""
    return {
        "checkpoint": folder / "job.checkpoint",
        "settings_hash": "abc",
        "checkpoint_seconds": 0.0,
        "report_seconds": 0.0,
    }


CURVES = ("train_loss", "val_loss", "grad_norm", "diverged", "evaluation_step")


def test_members_in_groups_train_as_all_at_once(tokens: TokenFile, validation: TokenFile) -> None:
    together = run(make_trainer(MEMBERS, tokens), validation)
    apart = run_in_groups(tokens, validation, 3)
    np.testing.assert_allclose(apart.train_loss, together.train_loss, atol=1e-4, rtol=0)
    np.testing.assert_allclose(apart.val_loss, together.val_loss, atol=1e-4, rtol=0)
    assert members_in_cache(width=32, tokens_a_step=2**12) == 2 and members_in_cache(width=2**20, tokens_a_step=1) == 1


def test_a_group_is_freed_before_the_next_one_is_built(tokens: TokenFile, validation: TokenFile) -> None:
    built: list[weakref.ref[Trainer]] = []

    def make(group: Sequence[Member]) -> Trainer:
        assert all(trainer() is None for trainer in built)
        trainer = make_trainer(group, tokens)
        built.append(weakref.ref(trainer))
        return trainer

    progress: list[float] = []
    options = {"report": lambda done, status="": progress.append(done), "report_seconds": 0.0}
    train(MEMBERS, make, 3, 32, TRAINING, validation, **options)  # type: ignore[arg-type]
    assert len(built) == 2
    assert progress == [*range(3, 61, 3), *range(61, 81)]  # of 4 members × 20 steps


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_killed_job_goes_on_and_gives_the_same_bits(
    tokens: TokenFile, validation: TokenFile, tmp_path: Path, optimizer: OptimizerName
) -> None:
    undisturbed = run(make_trainer(MEMBERS, tokens, optimizer=optimizer), validation)
    options = checkpointed(tmp_path)
    for last in (7, 13):
        with pytest.raises(Killed):
            run(make_trainer(MEMBERS, tokens, optimizer=optimizer), validation, **options, report=kill_at(4 * last))
        assert (tmp_path / "job.checkpoint").exists()
    finished = run(make_trainer(MEMBERS, tokens, optimizer=optimizer), validation, **options)
    for curve in CURVES:
        np.testing.assert_array_equal(getattr(finished, curve), getattr(undisturbed, curve))
    assert [path.name for path in tmp_path.iterdir()] == ["job.checkpoint"]  # the last, for the caller to remove


def test_the_last_checkpoint_gives_the_curves_at_once(tokens: TokenFile, validation: TokenFile, tmp_path: Path) -> None:
    options = {"checkpoint": tmp_path / "job.checkpoint", "settings_hash": "abc"}
    first = run_in_groups(tokens, validation, 3, **options)

    def nobody(group: Sequence[Member]) -> Trainer:
        raise AssertionError("trains again")

    again = train(MEMBERS, nobody, 3, 32, TRAINING, validation, **options)  # type: ignore[arg-type]
    for curve in CURVES:
        np.testing.assert_array_equal(getattr(again, curve), getattr(first, curve))
    # Those of the first time: on a busy machine both differ by what writing and reading take.
    assert again.spent.seconds > first.spent.seconds / 2


@pytest.mark.parametrize(("size", "resumed_size"), [(3, 3), (2, 2), (2, 1), (1, 4)])
def test_a_job_killed_in_its_second_group_keeps_its_groups(
    tokens: TokenFile, validation: TokenFile, tmp_path: Path, size: int, resumed_size: int
) -> None:
    """Also where another group size would be chosen when it goes on."""
    undisturbed = run_in_groups(tokens, validation, size)
    killed_at = size * 20 + 6 * min(size, len(MEMBERS) - size)
    with pytest.raises(Killed):
        run_in_groups(tokens, validation, size, **checkpointed(tmp_path), report=kill_at(killed_at))
    progress: list[float] = []
    options = checkpointed(tmp_path) | {"report": lambda done, status="": progress.append(done)}
    finished = run_in_groups(tokens, validation, resumed_size, **options)
    assert progress[0] == killed_at  # the step during which it was killed, again
    for curve in CURVES:
        np.testing.assert_array_equal(getattr(finished, curve), getattr(undisturbed, curve))
    assert [path.name for path in tmp_path.iterdir()] == ["job.checkpoint"]  # the last, for the caller to remove


class SmallDevice:
    """Makes trainers of a device that holds `members` of them; more run out of memory in the given step."""

    def __init__(self, tokens: TokenFile, members: int, step: int | None) -> None:
        self.tokens, self.members, self.step = tokens, members, step
        self.tried: list[int] = []

    def __call__(self, group: Sequence[Member]) -> Trainer:
        self.tried.append(len(group))
        fits = len(group) <= self.members
        if self.step is None and not fits:
            raise torch.OutOfMemoryError("while building")
        trainer = make_trainer(group, self.tokens)
        update = trainer.step

        def step(index: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
            if index == self.step and not fits:
                raise torch.OutOfMemoryError("while training")
            return update(index, factor)

        trainer.step = step  # type: ignore[method-assign]
        return trainer


@pytest.mark.parametrize("step", [None, 0, 7])
def test_a_group_that_does_not_fit_starts_again_with_half_the_members(
    tokens: TokenFile, validation: TokenFile, tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int | None
) -> None:
    device = SmallDevice(tokens, 2, step)
    with caplog.at_level(logging.WARNING):
        curves = train(MEMBERS, device, 4, 32, TRAINING, validation, **checkpointed(tmp_path))  # type: ignore[arg-type]
    assert device.tried == [4, 2, 2]
    assert caplog.messages == ["Out of memory: 4 members of width 32 at once; going on with 2"]
    expected = run_in_groups(tokens, validation, 2)
    for curve in CURVES:
        np.testing.assert_array_equal(getattr(curves, curve), getattr(expected, curve))


def test_a_group_that_goes_on_where_there_is_less_memory_starts_again(
    tokens: TokenFile, validation: TokenFile, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run_in_groups(tokens, validation, 4, **checkpointed(tmp_path), report=kill_at(4 * 7))
    device = SmallDevice(tokens, 2, None)
    curves = train(MEMBERS, device, 4, 32, TRAINING, validation, **checkpointed(tmp_path))  # type: ignore[arg-type]
    assert device.tried == [4, 2, 2]
    expected = run_in_groups(tokens, validation, 2)
    for curve in CURVES:
        np.testing.assert_array_equal(getattr(curves, curve), getattr(expected, curve))


def test_a_member_that_does_not_fit_goes_on_with_its_batches_in_parts(
    tokens: TokenFile, validation: TokenFile, caplog: pytest.LogCaptureFixture
) -> None:
    def make(group: list[Member]) -> Trainer:
        trainer = make_trainer(group, tokens)
        update = trainer.step

        def step(index: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
            if trainer.micro_batches < 2:
                raise torch.OutOfMemoryError
            return update(index, factor)

        trainer.step = step  # type: ignore[method-assign]
        return trainer

    with caplog.at_level(logging.WARNING):
        curves = train(MEMBERS[:2], make, 1, 32, TRAINING, validation)  # type: ignore[arg-type]
    assert caplog.messages == ["Out of memory: 1 member of width 32; going on with batches in 2 parts"]
    expected = train(MEMBERS[:2], lambda group: make_trainer(group, tokens), 1, 32, TRAINING, validation)  # type: ignore[arg-type]
    for curve in CURVES:
        # Loose, since where a loss jumps, sums in another order show.
        np.testing.assert_allclose(getattr(curves, curve), getattr(expected, curve), rtol=1e-3)


def test_a_member_that_does_not_fit_says_what_to_do(tokens: TokenFile, validation: TokenFile) -> None:
    device = SmallDevice(tokens, 0, 0)
    with pytest.raises(MachineError) as caught:
        train(MEMBERS, device, 4, 32, TRAINING, validation)
    is_said_as(caught.value, "a GPU whose memory does not hold one member")
    assert device.tried == [4, 2, 1, 1]  # the last with batches of two sequences in two parts


def test_members_that_cannot_be_probed_are_trained_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even one does not fit, training it says so."""

    def out_of_memory(members: Sequence[Member]) -> Trainer:
        raise torch.OutOfMemoryError("while building")

    for name in ("empty_cache", "memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    assert members_that_fit(MEMBERS, out_of_memory, torch.zeros(1, 2, 33, dtype=torch.int64)) == 1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("other settings", "of other settings (hash abc, this job's is def)"),
        ("truncated", "Error while deserializing"),
        ("tampered", "changed since it was written"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_set_aside(
    tokens: TokenFile,
    validation: TokenFile,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
    says: str,
) -> None:
    """It is neither loaded nor deleted, and the job starts afresh; twice, so that nothing set aside is overwritten."""
    undisturbed = run(make_trainer(MEMBERS, tokens), validation)
    checkpoint = tmp_path / "job.checkpoint"
    for aside in ("job.checkpoint.refused", "job.checkpoint.refused2"):
        options = checkpointed(tmp_path)
        with pytest.raises(Killed):
            run(make_trainer(MEMBERS, tokens), validation, **options, report=kill_at(12))
        content = bytearray(checkpoint.read_bytes())
        if damage == "truncated":
            content = content[:100]
        elif damage == "tampered":
            content[-100] ^= 1
        else:
            options["settings_hash"] = "def"
        checkpoint.write_bytes(content)
        caplog.clear()
        finished = run(make_trainer(MEMBERS, tokens), validation, **options)
        (message,) = caplog.messages
        assert says in message and f"set aside as {aside}" in message
        is_logged_as_on_the_page(message)
        assert (tmp_path / aside).read_bytes() == content
        np.testing.assert_array_equal(finished.train_loss, undisturbed.train_loss)
        checkpoint.unlink()


def test_what_a_kill_during_a_save_left_is_removed(tokens: TokenFile, validation: TokenFile, tmp_path: Path) -> None:
    left = tmp_path / "job.checkpoint.partial"
    left.mkdir()
    (left / ".tmp123").write_bytes(b"half of a checkpoint")
    run(make_trainer(MEMBERS, tokens), validation, **checkpointed(tmp_path) | {"checkpoint_seconds": 1e9})
    assert [path.name for path in tmp_path.iterdir()] == ["job.checkpoint"]


def test_members_are_clipped_by_their_own_norm() -> None:
    gradients = {"a": torch.tensor([[3.0, 4.0], [0.3, 0.4]]), "b": torch.tensor([[0.0], [0.0]])}
    weights = {"a": torch.ones(2), "b": torch.ones(2)}
    norms = gradient_norms(gradients, weights)
    torch.testing.assert_close(norms, torch.tensor([5.0, 0.5]))
    clip(gradients, norms, 1.0)
    torch.testing.assert_close(gradients["a"], torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_width_invariant_norm_weighs_by_the_sgd_multiplier(tokens: TokenFile) -> None:
    scaled = scaled_model(MODEL, 64, "heads", tokens.vocabulary_size, RULES, "adamw")
    scalings = [scaled.sgd_scalings["gdn_mup"], scaled.sgd_scalings["sp"]]
    names = ["embedding", "readout", "0.q"]
    invariant = norm_weights("width_invariant_norm", scalings, names, torch.device("cpu"))
    raw = norm_weights("global_norm", scalings, names, torch.device("cpu"))
    torch.testing.assert_close(invariant["embedding"], torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(invariant["readout"], torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(invariant["0.q"], torch.tensor([1.0, 1.0]))
    assert all(torch.equal(weight, torch.ones(2)) for weight in raw.values())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_updates_follow_torch_with_each_parameters_multipliers(tokens: TokenFile, optimizer: OptimizerName) -> None:
    """A member's update of a parameter is torch's, at its own learning rate, ε and weight decay."""
    training = TRAINING.model_copy(update={"weight_decay": 0.1, "clipping": "none"})
    trainer = make_trainer(
        [Member("gdn_mup", 0.01), Member("sp", 0.02)], tokens, optimizer=optimizer, training=training
    )
    scaled = scaled_model(MODEL, 32, "heads", tokens.vocabulary_size, RULES, optimizer)
    references = []
    for member, (rules, rate) in enumerate([("gdn_mup", 0.01), ("sp", 0.02)]):
        for name, weight in trainer.model.weights.items():
            rule = scaled.scalings[rules].parameters[name]
            twin = weight[member].clone().requires_grad_()
            decay = 0.1 * rule.weight_decay if twin.dim() > 1 else 0.0
            options = {"lr": rate * rule.learning_rate, "weight_decay": decay}
            if optimizer == "adamw":
                step = torch.optim.AdamW([twin], **options, eps=1e-8 * rule.epsilon, betas=(0.9, 0.95))
            else:
                step = torch.optim.SGD([twin], **options, momentum=0.9, nesterov=True)
            references.append((name, member, twin, step))
    for update in range(5):
        trainer.backward(update)
        gradients = trainer.gradients()
        for name, member, twin, step in references:
            twin.grad = gradients[name][member].clone()
            step.step()
        trainer.update(1.0)
    for name, member, twin, _ in references:
        torch.testing.assert_close(trainer.model.weights[name][member], twin, rtol=1e-5, atol=1e-7, msg=name)


def test_schedule_warms_up_peaks_and_ends_where_it_should() -> None:
    factors = [learning_rate_factor(step, TRAINING) for step in range(TRAINING.steps)]
    assert factors[0] == pytest.approx(1 / 3) and factors[2] == pytest.approx(1.0)
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[-1] == pytest.approx(TRAINING.final_learning_rate)
