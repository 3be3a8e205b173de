"""The coordinate check on flash-linear-attention's models, as they come, on a GPU: under the rules, and without them.

    python benchmarks/fla_models.py [--models GatedDeltaNet --models KDA] [--output benchmarks/records/fla_models.md]

Each model is built at three widths with heads of 32 channels, which grow in number, and trained for four updates on
random tokens, under bf16 autocast, as its kernels ask for. Without the rules: fla's own init, and AdamW with one
learning rate for every parameter and width.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import gdn_mup
from gdn_mup.checks.coordinates import LEARNING_RATE
from gdn_mup.checks.findings import findings

VOCABULARY, SEQUENCES, TOKENS = 4096, 4, 256
WIDTHS, SEEDS = (128, 256, 512), (0, 1, 2)
MODELS = ("GatedDeltaNet", "KDA", "DeltaNet", "Mamba2", "GLA")


def model_maker(name: str) -> Callable[[int], nn.Module]:
    """From a width to fla's model of that name, two layers deep."""
    import fla.models

    def make(width: int) -> nn.Module:
        # Mamba-2 expands its width by two and counts the heads of that.
        heads = {"num_heads": 2 * width // 32, "head_dim": 32} if name == "Mamba2" else {"num_heads": width // 32}
        config = getattr(fla.models, f"{name}Config")
        settings = config(hidden_size=width, num_hidden_layers=2, vocab_size=VOCABULARY, **heads)
        model: nn.Module = getattr(fla.models, f"{name}ForCausalLM")(settings)
        return model.to("cuda")

    return make


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the model's own forward pass."""
    with torch.autocast("cuda", torch.bfloat16):
        out: Tensor = model(input_ids=ids, labels=ids).loss
    return out


def without_rules(model: nn.Module, scaling: gdn_mup.Scaling) -> torch.optim.Optimizer:
    """The model as it comes."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def check_models(
    models: Annotated[list[str], typer.Option(help="Classes of fla.models, without `ForCausalLM`.")] = list(MODELS),  # noqa: B006
    output: Annotated[Path, typer.Option(help="Write the record here.")] = Path("benchmarks/records/fla_models.md"),
) -> None:
    """Check each and write what was found."""
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU: fla's forward passes run on no CPU")
    random = torch.Generator().manual_seed(0)
    batches = [torch.randint(VOCABULARY, (SEQUENCES, TOKENS), generator=random).to("cuda") for _ in range(4)]
    rows, details = [], []
    for name in models:
        counts = []
        for setup in (None, without_rules):
            dataset = gdn_mup.coordinate_check(
                model_maker(name), WIDTHS, batches, loss=loss, setup=setup, steps=(1, 4), seeds=SEEDS
            )
            found = findings(dataset)
            counts.append(len(found))
            details.append(f"\n{name}, {'without' if setup else 'under'} the rules: {len(found)}\n")
            details += [f"- {finding}" for finding in found]
        sizes = dataset.sizes
        rows.append(f"| {name} | {sizes['module']} | {sizes['parameter']} | {counts[0]} | {counts[1]} |")
        print(rows[-1], flush=True)
    lines = [
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, fla {version('flash-linear-attention')}. "
        f"Widths {', '.join(map(str, WIDTHS))}, seeds {len(SEEDS)}, four updates.",
        "",
        "| model of fla | outputs | parameters | findings under the rules | findings without |",
        "|---|---|---|---|---|",
        *rows,
        *details,
    ]
    output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(check_models)
