"""The shape of a Gated DeltaNet language model, and how it grows with width."""

from typing import Any, Literal, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from gdn_mup.settings import Settings, Size

GrowthMode = Literal["heads", "head_dim"]
InitName = Literal["study", "usual"]  # a study's own `initial_scale`, or one standard deviation at every width
KernelScale = Literal["one", "inverse_root"]  # what multiplies q in the delta rule: 1, or K^-1/2 as in attention


class InitialScale(Settings):
    """Initial standard deviations at the base width, where every rule set coincides.

    `embedding` is a standard deviation, all others are gains over 1/√fan-in.
    """

    embedding: float = Field(1.0, gt=0, description="Standard deviation of the embedding.")
    hidden: float = Field(1.0, gt=0, description="Gain of q, k, v, g and the MLP's input matrices.")
    residual: float = Field(1.0, gt=0, description="Gain of the matrices that write to the residual stream.")
    gate: float = Field(1.0, gt=0, description="Gain of the projections of α and β (W_a, W_b).")
    readout: float = Field(1.0, ge=0, description="Gain of the readout (ignored when embeddings are tied).")
    short_conv: float = Field(1.0, gt=0, description="Gain of the short convolutions, whose fan-in is `conv_size`.")
    mixer_output: float | None = Field(None, gt=0, description="Gain of W_o; that of `residual` where not given.")

    @model_serializer(mode="wrap")
    def _without_keys_that_came_later(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that was added must not change the settings of jobs that do not set it."""
        dumped: dict[str, Any] = handler(self)
        later = {key: type(self).model_fields[key].default for key in ("short_conv", "mixer_output")}
        return {key: value for key, value in dumped.items() if key not in later or value != later[key]}


class ModelSettings(Settings):
    """A Gated DeltaNet at the base width. `heads`, `head_dim` and `value_head_dim` are the base width's."""

    base_width: Size = Field(32, description="Width d₀ of the residual stream at which rule sets coincide.")
    layers: Size = Field(2, description="Blocks: a gated delta rule mixer and an MLP each.")
    heads: Size = Field(2, description="Heads at the base width.")
    head_dim: Size = Field(16, description="Key dimension K of a head at the base width.")
    value_head_dim: Size = Field(16, description="Value dimension V of a head at the base width.")
    mlp_ratio: float = Field(3.0, gt=0, le=1024, description="Inner width of the gated MLP over the model's width.")
    conv_size: Size = Field(4, description="Taps of the short causal convolution on q, k and v.")
    tied_embeddings: bool = Field(False, description="Whether the readout is the embedding's transpose.")
    norm_epsilon: float = Field(1e-5, ge=0, description="ε of every RMSNorm.")
    initial_scale: InitialScale = InitialScale()


class ModelShape(NamedTuple):
    """A model of one width, all sizes resolved. Compare two of them to see which axes grow."""

    width: int
    layers: int
    heads: int
    head_dim: int
    value_head_dim: int
    mlp_width: int
    conv_size: int
    vocabulary_size: int
    tied_embeddings: bool

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        keys, values = self.heads * self.head_dim, self.heads * self.value_head_dim
        projections = self.width * (2 * keys + 3 * values + 2 * self.heads)  # q, k; v, g, o; W_a, W_b
        convolutions = self.conv_size * (2 * keys + values)
        vectors = 2 * self.width + self.value_head_dim + 2 * self.heads  # gains; A_log, dt_bias
        block = projections + convolutions + vectors + 3 * self.width * self.mlp_width
        tables = (1 if self.tied_embeddings else 2) * self.vocabulary_size * self.width
        return self.layers * block + tables + self.width


def model_shape(model: ModelSettings, width: int, growth: GrowthMode, vocabulary_size: int) -> ModelShape:
    """The model at `width`, grown from the base width by more heads or by larger heads.

    Raises ValueError, naming the widths that fit, if a size would not be a whole number, or would be zero.
    """
    grown = {"heads": model.heads, "head_dim": model.head_dim, "value_head_dim": model.value_head_dim}
    for size in ("heads",) if growth == "heads" else ("head_dim", "value_head_dim"):
        scaled, remainder = divmod(grown[size] * width, model.base_width)
        if remainder or scaled == 0:
            raise ValueError(
                f"width {width} does not give a whole number of {size}: {grown[size]} at base width "
                f"{model.base_width}, growth `{growth}`; use multiples of {model.base_width}"
            )
        grown[size] = scaled
    mlp_width = round(model.mlp_ratio * width)
    if mlp_width == 0:
        raise ValueError(f"width {width} leaves no inner width to the MLP: model.mlp_ratio is {model.mlp_ratio}")
    return ModelShape(
        width=width,
        layers=model.layers,
        mlp_width=mlp_width,
        conv_size=model.conv_size,
        vocabulary_size=vocabulary_size,
        tied_embeddings=model.tied_embeddings,
        **grown,
    )
