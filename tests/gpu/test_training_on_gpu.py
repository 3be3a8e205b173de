"""Training on a GPU against training on the CPU in float32, and the promises of the member axis there."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from gdn_mup.corpus.tokens import TokenFile
from gdn_mup.measurement.coordinates import coordinate_check
from gdn_mup.measurement.evaluation import held_out_losses
from gdn_mup.model.config import ModelSettings
from gdn_mup.progress import silent
from gdn_mup.training.config import TrainingSettings
from gdn_mup.training.sweep import Member, Trainer, scaled_model, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

MODEL = ModelSettings(base_width=64, layers=2, heads=1, head_dim=64, value_head_dim=64)
TRAINING = TrainingSettings(
    steps=12, warmup_steps=2, batch_size=4, context_length=128, evaluate_every=6, evaluation_batches=2
)
WIDTH = 128
MEMBERS = [Member(rules, 2.0**exponent) for rules in ("sp", "gdn_mup") for exponent in (-10, -8, -6)]


def make_trainer(
    members: Sequence[Member],
    tokens: TokenFile,
    device: str,
    optimizer: str = "adamw",
    kind: type[Trainer] | None = None,
) -> Trainer:
    from gdn_mup.training.gpu import GpuTrainer

    rules = ["sp", "gdn_mup"]
    scaled = scaled_model(MODEL, WIDTH, "heads", tokens.vocabulary_size, rules, optimizer)  # type: ignore[arg-type]
    kind = kind or (GpuTrainer if device == "cuda" else Trainer)
    return kind(members, scaled, MODEL, TRAINING, optimizer, 0, tokens, device)  # type: ignore[arg-type]


def steps(trainer: Trainer, count: int = TRAINING.steps) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradient norms [M, count] on the CPU."""
    results = [tuple(x.cpu().clone() for x in trainer.step(step, 1.0)) for step in range(count)]
    losses, norms = (torch.stack(column, 1) for column in zip(*results, strict=True))
    return losses, norms


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_losses_follow_those_of_the_cpu(optimizer: str, tokens: TokenFile) -> None:
    """bf16 products against float32: 1e-3 in the first loss, and what twelve steps make of that."""
    on_gpu, gpu_norms = steps(make_trainer(MEMBERS, tokens, "cuda", optimizer))
    on_cpu, cpu_norms = steps(make_trainer(MEMBERS, tokens, "cpu", optimizer))
    print("largest relative difference of losses", float((on_gpu / on_cpu - 1).abs().max()))
    torch.testing.assert_close(on_gpu[:, 0], on_cpu[:, 0], rtol=1e-3, atol=0)
    torch.testing.assert_close(gpu_norms[:, 0], cpu_norms[:, 0], rtol=2e-2, atol=0)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-2, atol=0)


def test_gradients_are_those_of_the_cpu(tokens: TokenFile) -> None:
    trainers = [make_trainer(MEMBERS, tokens, device) for device in ("cuda", "cpu")]
    gradients = []
    for trainer in trainers:
        trainer.backward(0)
        gradients.append({name: gradient.cpu() for name, gradient in trainer.gradients().items()})
    found, expected = gradients
    for name, gradient in expected.items():
        for member in range(len(MEMBERS)):
            difference = float((found[name][member] - gradient[member]).norm() / gradient[member].norm())
            # Sums over all tokens of terms that nearly cancel: the gates' scalars.
            assert difference <= (0.2 if name.endswith(("A_log", "dt_bias")) else 0.05), (name, member, difference)


def test_replayed_steps_are_the_steps(tokens: TokenFile) -> None:
    """The recorded graph against the same kernels launched one by one: the same bits."""
    replayed, norms = steps(make_trainer(MEMBERS, tokens, "cuda"))
    trainer = make_trainer(MEMBERS, tokens, "cuda")
    for step in range(TRAINING.steps):
        losses = trainer.backward(step).cpu()
        own_norms = trainer.update(1.0).cpu()
        assert torch.equal(losses, replayed[:, step])
        assert torch.equal(own_norms, norms[:, step])


def test_batches_in_parts_train_the_same(tokens: TokenFile) -> None:
    whole, norms = steps(make_trainer(MEMBERS, tokens, "cuda"))
    trainer = make_trainer(MEMBERS, tokens, "cuda")
    trainer.micro_batches = 2
    in_parts, own_norms = steps(trainer)
    torch.testing.assert_close(in_parts, whole, rtol=5e-3, atol=0)
    torch.testing.assert_close(own_norms[:, 0], norms[:, 0], rtol=5e-3, atol=0)


def test_a_member_alone_is_the_member_in_company(tokens: TokenFile) -> None:
    company, _ = steps(make_trainer(MEMBERS, tokens, "cuda"))
    alone, _ = steps(make_trainer(MEMBERS[4:5], tokens, "cuda"))
    torch.testing.assert_close(alone[0], company[4], rtol=5e-3, atol=0)


def test_a_member_of_nan_stays_alone(tokens: TokenFile) -> None:
    calm, _ = steps(make_trainer(MEMBERS, tokens, "cuda"))
    trainer = make_trainer(MEMBERS, tokens, "cuda")
    trainer.model.weights["0.q"][2, 0, 0] = torch.nan
    wild, _ = steps(trainer)
    others = [member for member in range(len(MEMBERS)) if member != 2]
    assert wild[2].isnan().all()
    assert torch.equal(wild[others], calm[others])


def test_a_state_that_is_saved_goes_on(tokens: TokenFile) -> None:
    whole, _ = steps(make_trainer(MEMBERS, tokens, "cuda"))
    first = make_trainer(MEMBERS, tokens, "cuda")
    steps(first, 5)
    state = {name: tensor.cpu().clone() for name, tensor in first.state().items()}
    second = make_trainer(MEMBERS, tokens, "cuda")
    second.load_state(state)
    for step in range(5, TRAINING.steps):
        losses, _ = second.step(step, 1.0)
        assert torch.equal(losses.cpu(), whole[:, step])


def test_groups_give_what_one_group_gives(tokens: TokenFile, validation: TokenFile) -> None:
    def curves(size: int) -> torch.Tensor:
        made = train(
            MEMBERS, lambda members: make_trainer(members, tokens, "cuda"), size, WIDTH, TRAINING, validation
        )  # fmt: skip
        return torch.from_numpy(made.val_loss)

    torch.testing.assert_close(curves(2), curves(len(MEMBERS)), rtol=5e-3, atol=0)


@contextmanager
def little_memory(gib: float, tokens: TokenFile) -> Iterator[int]:
    """Leave so much of the GPU's memory free; gives the bytes that this process holds meanwhile."""
    steps(make_trainer(MEMBERS[:1], tokens, "cuda"), 4)  # what is set up once takes memory of its own
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    hoard = torch.empty(free - int(gib * 2**30), dtype=torch.uint8, device="cuda")
    try:
        yield torch.cuda.memory_reserved()
    finally:
        del hoard
        torch.cuda.empty_cache()


MANY = [Member("gdn_mup", 2.0 ** (-10 + i / 64)) for i in range(256)]


def test_members_fill_the_memory_they_are_given(tokens: TokenFile, validation: TokenFile) -> None:
    """With little memory left, groups are as large as fit, and training goes through."""
    from gdn_mup.training.memory import members_that_fit

    batches = torch.from_numpy(validation.fixed_batches(1, TRAINING.batch_size, TRAINING.context_length))
    with little_memory(1.0, tokens) as held:
        size = members_that_fit(MANY, lambda group: make_trainer(group, tokens, "cuda"), batches)
        torch.cuda.reset_peak_memory_stats()
        trainer = make_trainer(MANY[:size], tokens, "cuda")
        held_out_losses(trainer.model, batches.cuda())
        steps(trainer, 4)
        used = torch.cuda.max_memory_reserved() - held
        del trainer
    print(f"{size} members, {used / 2**30:.0%} of the memory")
    assert size < len(MANY)
    assert used >= 0.8 * 2**30


def test_a_group_that_does_not_fit_starts_again_with_half_the_members(
    tokens: TokenFile, validation: TokenFile, caplog: pytest.LogCaptureFixture
) -> None:
    """A real out-of-memory error, wherever in building, running or recording a step it comes."""
    few = MANY[:160]
    with little_memory(1.0, tokens), caplog.at_level(logging.WARNING):
        curves = train(few, lambda group: make_trainer(group, tokens, "cuda"), len(few), WIDTH, TRAINING, validation)
    print(caplog.messages)
    assert caplog.messages[0] == "Out of memory: 160 members of width 128 at once; going on with 80"
    alone = train(few[:1], lambda group: make_trainer(group, tokens, "cuda"), 1, WIDTH, TRAINING, validation)
    assert not curves.diverged.any()
    np.testing.assert_allclose(curves.val_loss[0], alone.val_loss[0], rtol=5e-3)


def test_coordinates_are_those_of_the_cpu(tokens: TokenFile, validation: TokenFile) -> None:
    """Sizes that a coordinate check records, before training and after two updates: float32 on both."""
    members = [Member(rules, 2.0**-6) for rules in ("sp", "gdn_mup")]
    probe = torch.from_numpy(validation.fixed_batches(1, 2, TRAINING.context_length)[0, :, :-1])
    on_gpu, on_cpu = (
        coordinate_check(make_trainer(members, tokens, device, kind=Trainer), members, (0, 2), probe, silent)
        for device in ("cuda", "cpu")
    )
    for name in on_cpu.data_vars:
        np.testing.assert_array_equal(on_gpu[name].isnull(), on_cpu[name].isnull())
        furthest = float(abs(on_gpu[name] / on_cpu[name] - 1).max())
        print(name, furthest)
        assert furthest <= 1e-2, name
