"""Model FLOPs: what the arithmetic of a Gated DeltaNet costs, whatever carries it out.

A multiplication and an addition are two. Counted are the products with weight matrices, 2 for each of their entries
and token, and the recurrence of the gated delta rule as it is written: reading the state by the key, writing to it and
reading it by the query take 2 K V each for a head and token. Norms, gates, activations and the short convolution
(together below a percent at widths of hundreds) and the lookup of embeddings are not counted, nor is what an
implementation does twice or in larger blocks than it must. A backward pass is twice its forward pass.
"""

from gdn_mup.model.config import ModelShape


def forward_flops(shape: ModelShape) -> int:
    """FLOPs of one token's forward pass through one model."""
    keys, values = shape.heads * shape.head_dim, shape.heads * shape.value_head_dim
    mixer = shape.width * (2 * keys + 3 * values + 2 * shape.heads)  # q, k; v, g, o; W_a, W_b
    mlp = 3 * shape.width * shape.mlp_width
    recurrence = 3 * shape.heads * shape.head_dim * shape.value_head_dim
    return 2 * (shape.layers * (mixer + mlp + recurrence) + shape.width * shape.vocabulary_size)


def training_flops(shape: ModelShape) -> int:
    """FLOPs of one token's forward and backward pass through one model."""
    return 3 * forward_flops(shape)
