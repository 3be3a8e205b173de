"""gdn-mup: how the hyperparameters of Gated Delta Networks scale with width."""

__version__ = "0.1.0"
