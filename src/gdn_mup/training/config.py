"""How a member is trained, apart from its learning rate and its rule set."""

from typing import Literal, Self

from pydantic import Field, model_validator

from gdn_mup.settings import LARGEST_SIZE, Count, Settings, Size

OptimizerName = Literal["adamw", "sgd"]
Clipping = Literal["none", "global_norm", "width_invariant_norm"]


class TrainingSettings(Settings):
    """One training run. A step is one update on `batch_size` sequences of `context_length` tokens."""

    steps: Count = Field(150, description="Updates.")
    warmup_steps: int = Field(15, ge=0, description="Steps of linear warm-up from zero.")
    final_learning_rate: float = Field(
        0.1, ge=0, le=1, description="Where the cosine ends, as a fraction of the peak learning rate."
    )
    batch_size: Size = Field(8, description="Sequences a step.")
    context_length: int = Field(128, gt=1, le=LARGEST_SIZE, description="Tokens predicted in a sequence.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay at the base width.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov momentum (SGD), or β₁ (AdamW).")
    beta2: float = Field(0.95, gt=0, lt=1, description="β₂ (AdamW).")
    epsilon: float = Field(1e-8, gt=0, description="ε (AdamW) at the base width.")
    clipping: Clipping = Field(
        "global_norm",
        description="`none`; `global_norm`: the raw norm; `width_invariant_norm`: Σ (SGD multiplier)·‖g‖².",
    )
    clip_norm: float = Field(1.0, gt=0, description="The norm above which a member's gradient is scaled down.")
    evaluate_every: Count = Field(50, description="Steps between held-out losses (the last step always).")
    evaluation_batches: Size = Field(4, description="Fixed held-out batches, the same for every member.")

    @property
    def evaluation_steps(self) -> list[int]:
        """Updates after which held-out losses are taken, from 0 to `steps`."""
        return sorted({*range(0, self.steps, self.evaluate_every), self.steps})

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self
