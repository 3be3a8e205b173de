"""Models that the rules for any module are tested on: plain ones, and unmodified ones of other packages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn_mup.model.language_model import parameter_table
from gdn_mup.scaling.growth import Part

VOCABULARY, CONTEXT = 16, 8


class Mlp(nn.Module):
    """Embedding-less: reads 6 numbers, writes 5."""

    def __init__(self, width: int, readout: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.input = nn.Linear(6, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width, bias=False)
        self.readout = readout(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.narrow(functional.gelu(self.hidden(functional.gelu(self.input(x))))))


class Transformer(nn.Module):
    """A pre-norm transformer of one block; heads of 8 channels, as many as the width asks for."""

    def __init__(self, width: int, readout: type[nn.Linear] = nn.Linear, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.randn(CONTEXT, width) * 0.1)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.queries, self.keys, self.values, self.output = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = readout(width, VOCABULARY)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        h = self.norms[0](x)
        q, k, v = (
            project(h).unflatten(-1, (-1, 8)).transpose(1, 2) for project in (self.queries, self.keys, self.values)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x))


class Gated(nn.Module):
    """Two heads that grow, each scaled by a gate of the input: the gates' matrix has a fan-out that does not grow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(VOCABULARY, width), nn.LayerNorm(width)
        self.values, self.output = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.gates, self.head = nn.Linear(width, 2, bias=False), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids))
        heads = self.values(x).unflatten(-1, (2, -1)) * torch.sigmoid(self.gates(x))[..., None]
        return self.head(x + self.output(heads.flatten(-2).cumsum(1)))


TRANSFORMER_AXES = {"positions": "stack out"}


def of_table(shape: Any) -> nn.Module:
    """The study's own parameters, as modules of torch: shapes alone, no forward pass."""
    root = nn.Module()
    for name, info in parameter_table(shape).items():
        *path, leaf = name.replace(".", "_.").split(".")
        parent = root
        for step in path:
            if step not in dict(parent.named_children()):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        match info.part:
            case Part.EMBEDDING:
                module: nn.Module = nn.Embedding(*info.shape)
            case Part.NORM:
                module = nn.RMSNorm(info.shape)
            case Part.SHORT_CONV:
                module = nn.Conv1d(info.fan_out, info.fan_out, info.fan_in, groups=info.fan_out, bias=False)
                module.weight = nn.Parameter(module.weight.detach().clone())
            case Part.GATE_SCALAR:
                module = nn.Module()
                module.weight = nn.Parameter(torch.rand(info.shape).log())
            case _:
                module = nn.Linear(info.fan_in, info.fan_out, bias=False)
        parent.add_module(leaf, module)
    if shape.tied_embeddings:
        root.readout = nn.Linear(shape.width, shape.vocabulary_size, bias=False)
        root.readout.weight = root.embedding.weight
    return root


def study_name(name: str) -> str:
    """The study's name of a parameter of `of_table`."""
    return name.removesuffix(".weight").replace("_.", ".")


def qwen3_next(width: int, tied: bool = False, **options: Any) -> nn.Module:
    """Transformers' hybrid: three gated delta rules and one softmax attention, experts in every block."""
    transformers = pytest.importorskip("transformers")
    heads = width // 16
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": heads // 2,
        "linear_num_value_heads": heads,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "tie_word_embeddings": tied,
    }
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**(config | options)))


def llama(width: int, **options: Any) -> nn.Module:
    """Transformers' Llama, two layers, with as many key-value heads as the width asks for."""
    transformers = pytest.importorskip("transformers")
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(config | options)))


def fla_model(name: str, **options: Any) -> Callable[[int], nn.Module]:
    """A model of flash-linear-attention by the name of its class, with heads of 32 channels."""
    models = pytest.importorskip("fla.models", reason="flash-linear-attention is not installed")
    # Mamba-2 expands its width by two and counts the heads of that.
    heads = {"Mamba2": lambda width: {"num_heads": 2 * width // 32, "head_dim": 32}}.get(
        name, lambda width: {"num_heads": width // 32}
    )

    def make(width: int) -> nn.Module:
        config = {"hidden_size": width, "num_hidden_layers": 1, "vocab_size": VOCABULARY} | heads(width) | options
        return getattr(models, f"{name}ForCausalLM")(getattr(models, f"{name}Config")(**config))

    return make
