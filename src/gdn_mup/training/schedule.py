"""Learning-rate schedule, the same for every member and every width."""

import math

from gdn_mup.training.config import TrainingSettings


def learning_rate_factor(step: int, training: TrainingSettings) -> float:
    """The peak learning rate's multiplier in update `step` = 0, 1, …: linear warm-up, then a cosine.

    The first update is not wasted on a learning rate of zero, and the last ends on `final_learning_rate`.
    """
    if step < training.warmup_steps:
        return (step + 1) / (training.warmup_steps + 1)
    done = (step - training.warmup_steps) / max(1, training.steps - 1 - training.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return training.final_learning_rate + (1 - training.final_learning_rate) * cosine
