"""Figures for print. Every function takes a collected dataset and returns a figure and the table that it shows.

A title says what the data say, computed from them. `save` writes a figure as svg, png and csv.
"""

from gdn_mup.study.figures.clipped_updates import clipped_updates
from gdn_mup.study.figures.clipping import clipping_against_width
from gdn_mup.study.figures.coordinates import coordinate_check
from gdn_mup.study.figures.dynamics import gate_and_state_dynamics
from gdn_mup.study.figures.exponents import gate_gradient_exponents, predicted_exponents
from gdn_mup.study.figures.growth import growth_modes
from gdn_mup.study.figures.losses import loss_vs_width
from gdn_mup.study.figures.multiplier import norm_epsilon
from gdn_mup.study.figures.over_training import transfer_over_training
from gdn_mup.study.figures.published import published_losses
from gdn_mup.study.figures.style import Drawing, save
from gdn_mup.study.figures.training import training_curves
from gdn_mup.study.figures.training_length import transfer_against_training_length
from gdn_mup.study.figures.transfer import lr_transfer, optimum_vs_width
from gdn_mup.study.figures.tuning import base_width_tuning

__all__ = [
    "Drawing",
    "base_width_tuning",
    "clipped_updates",
    "clipping_against_width",
    "coordinate_check",
    "gate_and_state_dynamics",
    "gate_gradient_exponents",
    "growth_modes",
    "loss_vs_width",
    "lr_transfer",
    "norm_epsilon",
    "optimum_vs_width",
    "predicted_exponents",
    "published_losses",
    "save",
    "training_curves",
    "transfer_against_training_length",
    "transfer_over_training",
]
