"""The rules under torch.compile, DistributedDataParallel and FSDP2, on a CPU with gloo."""

from functools import partial
from pathlib import Path

import torch
from module_examples import CONTEXT, TRANSFORMER_AXES, VOCABULARY, Transformer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gdn_mup import Scaling

BASE, TARGET = 32, 128
MAKE = partial(Transformer, tied=True)


class Fused(nn.Module):
    """A tied transformer, with a layer whose last rows do not grow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk, self.fused = MAKE(width), nn.Linear(width, width + 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.trunk(ids) + self.fused(self.trunk.tokens(ids)).square().mean()


def between() -> Scaling:
    rows = {"fused": lambda model: [model.fused.out_features - 16, 16]}
    return Scaling.between(Fused, BASE, TARGET, axes=TRANSFORMER_AXES, parts=rows)


def with_padding(width: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(9, width, padding_idx=1), nn.Linear(width, 4))


def fresh() -> Fused:
    torch.manual_seed(0)
    return Fused(TARGET)


def batch() -> torch.Tensor:
    return torch.randint(VOCABULARY, (4, CONTEXT), generator=torch.Generator().manual_seed(1))


def train(scaling: Scaling, model: nn.Module, run: nn.Module | None = None) -> torch.optim.Optimizer:
    """Initialise, and take two steps; every process sees the same batch."""
    scaling.initialize(model)
    optimizer = torch.optim.AdamW(scaling.parameter_groups(model, "adamw", 1e-2, weight_decay=0.1))
    for _ in range(2):
        ids = batch()
        loss = nn.functional.cross_entropy((run or model)(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


def full(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), parameter in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(full(mine), full(parameter), rtol=1e-4, atol=1e-6), name


def test_a_compiled_model_is_the_same_model():
    scaling, plain = between(), fresh()
    train(scaling, plain)
    inside = fresh()
    scaling.initialize(inside)
    compiled = torch.compile(inside, backend="aot_eager")
    train(scaling, compiled)
    assert_same(compiled, plain)


def in_process(rank: int, processes: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    try:
        scaling, plain = between(), fresh()
        optimizer = train(scaling, plain)
        parallel, sharded = nn.parallel.DistributedDataParallel(fresh()), fresh()
        fully_shard(sharded.fused)
        fully_shard(sharded)
        assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
        for model in (parallel, sharded):
            groups = train(scaling, model).param_groups
            assert_same(model, plain)
            for one, other in zip(optimizer.param_groups, groups, strict=True):
                assert all(one[key] == other[key] for key in ("lr", "weight_decay", "eps"))
        in_part = fresh()
        fully_shard(in_part.fused)  # plain parameters beside sharded ones: no group of the optimizer mixes them
        for group in train(scaling, in_part).param_groups:
            assert len({type(parameter) for parameter in group["params"]}) == 1
        assert_same(in_part, plain)
        padded = Scaling.between(with_padding, BASE, TARGET)
        for std in (None, 0.02):
            model = with_padding(TARGET)
            fully_shard(model)
            padded.initialize(model, std=std)
            assert (full(model[0].weight)[1] == 0).all() and (full(model[0].weight)[0] != 0).all()
        model = fresh()
        scaling.initialize(model)
        fully_shard(model)
        before = [full(parameter).clone() for parameter in model.parameters()]
        scaling.initialize(model)  # rescaled before it was sharded: nothing is left to do
        assert all(torch.equal(full(p), b) for p, b in zip(model.parameters(), before, strict=True))
        scaling.initialize(model, std=0.02)
        assert abs(full(model.trunk.queries.weight).std().item() - 0.01) < 5e-4
    finally:
        torch.distributed.destroy_process_group()


def test_parallel_and_sharded_models_train_as_the_plain_one(tmp_path: Path):
    torch.multiprocessing.spawn(in_process, (2, str(tmp_path / "rendezvous")), nprocs=2)
