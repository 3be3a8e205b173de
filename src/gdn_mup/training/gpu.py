"""Training on a GPU: fused operations, one optimizer kernel for all members, and the whole step as one CUDA graph.

A step of a small model is hundreds of kernels of a few microseconds each, less than what launching one costs the
CPU. So the step is recorded once and replayed: what changes from step to step (the batch, the learning rates'
factor) is copied into fixed places on the device before, and nothing waits for the device.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdn_mup.kernels.optimizer import adamw_step, gradient_norms, parameter_index, sgd_step
from gdn_mup.model.config import ModelSettings
from gdn_mup.model.fused_operations import FusedOperations
from gdn_mup.model.kernels import check_delta_rule, check_head_dim
from gdn_mup.model.language_model import LanguageModel
from gdn_mup.scaling.apply import ModelScaling
from gdn_mup.training.config import OptimizerName, TrainingSettings
from gdn_mup.training.sweep import Member, Scaled, Trainer

EAGER_STEPS = 2  # steps before the recording: kernels compile and libraries set themselves up in the first


class FusedOptimizer:
    """AdamW or SGD for all members of a model, with clipping: the same arithmetic as `MemberOptimizer`.

    Every member and parameter has its own learning rate, weight decay and ε. `gradient` [M, P] is where the
    model's fused operations leave gradients; `norm_weights` says what each parameter's ‖g‖² weighs, name -> [M].
    """

    def __init__(
        self,
        optimizer: OptimizerName,
        model: LanguageModel,
        gradient: Tensor,
        scalings: Sequence[ModelScaling],
        learning_rates: Sequence[float],
        norm_weights: Mapping[str, Tensor],
        training: TrainingSettings,
    ) -> None:
        self._training, self._values, self._gradient = training, model.flat, gradient
        names, device = list(model.layout.parameters), model.flat.device

        def coefficients(value: Callable[[int, str], float]) -> Tensor:
            """[M, parameters]"""
            rows = [[value(member, name) for name in names] for member in range(model.members)]
            return torch.tensor(rows, dtype=torch.float32, device=device)

        self._rates = coefficients(lambda m, name: learning_rates[m] * scalings[m].parameters[name].learning_rate)
        self._decays = coefficients(lambda m, name: training.weight_decay * scalings[m].parameters[name].weight_decay)
        self._epsilons = coefficients(lambda m, name: training.epsilon * scalings[m].parameters[name].epsilon)
        self._norm_weights = torch.stack([norm_weights[name] for name in names], 1).contiguous()
        places = [(model.layout.parameters[name].offset, model.layout.parameters[name].size) for name in names]
        self._index = parameter_index(places, model.layout.size, device)
        self._mean = torch.zeros_like(model.flat)
        self._square = torch.zeros_like(model.flat) if optimizer == "adamw" else None
        self._updates = 0
        self._scalars = torch.zeros(3, device=device)

    def step(self, factor: float) -> Tensor:
        """Clip and take one update at `factor` times the peak learning rates; norms [M] before clipping."""
        self.prepare(factor)
        return self.apply()

    def prepare(self, factor: float) -> None:
        """Tell the device which update comes next, at `factor` times the peak learning rates."""
        self._updates += 1
        beta1, beta2 = self._training.momentum, self._training.beta2
        scalars = [factor, 1 - beta1**self._updates, 1 - beta2**self._updates]
        _send(torch.tensor(scalars), self._scalars)

    def apply(self) -> Tensor:
        """Take the update that was prepared; gradient norms [M] before clipping. Runs on the device alone."""
        training = self._training
        norms = gradient_norms(self._gradient, self._index, self._norm_weights)
        clip = torch.ones_like(norms)
        if training.clipping != "none":
            clip = (training.clip_norm / norms).clamp(max=1.0)  # NaN for a member that has diverged
        coefficients = self._index, self._rates, self._decays
        if self._square is not None:
            adamw_step(
                self._values, self._gradient, self._mean, self._square, *coefficients, self._epsilons, clip,
                self._scalars, training.momentum, training.beta2,
            )  # fmt: skip
        else:
            sgd_step(
                self._values, self._gradient, self._mean, *coefficients, clip, self._scalars, training.momentum
            )  # fmt: skip
        return norms

    def state(self) -> dict[str, Tensor]:
        """Momenta and the number of updates, for a checkpoint."""
        square = {} if self._square is None else {"square": self._square}
        return {"mean": self._mean, **square, "updates": torch.tensor(self._updates)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        self._mean.copy_(tensors["mean"])
        if self._square is not None:
            self._square.copy_(tensors["square"])
        self._updates = int(tensors["updates"])


class Captured:
    """A function of no arguments that runs on the device alone: called as it is at first, then replayed as a graph.

    Its results are tensors that the next call overwrites.
    """

    def __init__(self, function: Callable[[], Any], eager_calls: int = EAGER_STEPS) -> None:
        self._function, self._eager_calls, self._calls = function, eager_calls, 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    def __call__(self) -> Any:
        self._calls += 1
        if self._calls <= self._eager_calls:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._result = self._function()
            torch.cuda.current_stream().wait_stream(self._stream)
            return self._result
        if self._graph is None:
            self._result = None  # its memory, and all that the eager calls left, is free for the graph's own
            graph = torch.cuda.CUDAGraph()
            # Of this thread alone: NCCL's watchdog, where processes meet, asks the device at any time.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._function()
            self._graph = graph
        self._graph.replay()
        return self._result


def _send(values: Tensor, place: Tensor) -> None:
    """Copy to a place on the device in the order of its work, without waiting for that work."""
    if place.is_cuda:
        values = values.pin_memory()  # kept until the copy is done
    place.copy_(values, non_blocking=True)


class GpuTrainer(Trainer):
    """A trainer whose steps are fused kernels, replayed as one graph."""

    def _optimizer(
        self,
        optimizer: OptimizerName,
        scalings: Sequence[ModelScaling],
        learning_rates: Sequence[float],
        norm_weights: Mapping[str, Tensor],
    ) -> FusedOptimizer:
        shape = self.model.shape
        check_head_dim(shape.width, shape.head_dim)
        check_delta_rule(shape.head_dim, shape.value_head_dim, self.device)
        operations = FusedOperations(self.model)
        self.model.operations = operations
        fused = FusedOptimizer(
            optimizer, self.model, operations.gradient, scalings, learning_rates, norm_weights, self.training
        )
        ids = self.training.batch_size // self.processes.count, self.training.context_length + 1
        batch = torch.zeros(ids, dtype=torch.int64, device=self.device)
        self._fused, self._batch, self._gradient = fused, batch, operations.gradient
        alone = self.processes.count == 1
        self._captured = Captured(lambda: (self._backward(batch), fused.apply() if alone else None))
        return fused

    def step(self, step: int, factor: float) -> tuple[Tensor, Tensor]:
        """One update on the step's batch: losses and gradient norms [M], which the next step overwrites."""
        _send(self._ids(step), self._batch)
        self._fused.prepare(factor)
        losses, norms = self.processes.in_memory(self._captured)
        if norms is None:  # processes meet between the gradients and the update
            self.processes.average(losses, self._gradient)
            norms = self._fused.apply()
        return losses, norms

    def _backward(self, batch: Tensor) -> Tensor:
        total, losses = None, []
        for part in batch.chunk(self.micro_batches):
            self.model.zero_grad()
            mean = self.model.losses(part)
            mean.sum().backward()
            losses.append(mean.detach())
            if self.micro_batches > 1:  # a backward overwrites what the one before it left
                total = self._gradient.clone() if total is None else total.add_(self._gradient)
        if total is not None:
            torch.div(total, self.micro_batches, out=self._gradient)
        return torch.stack(losses).mean(0)


def compile_kernels(scaled: Scaled, model: ModelSettings, training: TrainingSettings, optimizer: OptimizerName) -> None:
    """Compile whatever a job of this shape runs on the current GPU, by training two members for a step on nothing."""

    class Nothing:
        def batch(self, seed: int, step: int, batch_size: int, context_length: int) -> np.ndarray:
            return np.zeros((batch_size, context_length + 1), np.int64)

    members = [Member(next(iter(scaled.scalings)), 0.0)] * 2
    trainer = GpuTrainer(members, scaled, model, training, optimizer, 0, Nothing(), "cuda")  # type: ignore[arg-type]
    trainer.step(0, 0.0)
    trainer.held_out_losses(trainer.batch(0)[None])
    torch.cuda.synchronize()
