"""What the gates make of the memory: how fast it forgets, how strongly it is written, how many directions it uses.

The state of a head is multiplied by α at every token, so that what was written ln 2 / −ln α tokens ago has half its
size. The effective rank of a state S is the exponential of the entropy of its singular values, normalised to sum to
one (Roy and Vetterli, EUSIPCO 2007): 1 for a single key–value pair, and n for n orthogonal ones of equal size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

QUANTILES = (0.05, 0.5, 0.95)


def gate_and_state(log_alpha: Tensor, beta: Tensor, state: Tensor, tokens: int) -> dict[str, Tensor]:
    """Summaries over the tokens and heads of one layer, by member.

    Args:
        log_alpha: ln α, the log of the decay gate, [M, B·T, H].
        beta: the writing gate, [M, B·T, H].
        state: S at the end of each sequence, [M, B, H, K, V].
        tokens: T, of a sequence.

    Returns:
        `alpha_mean`, `beta_mean` [M]; `alpha_quantile`, `beta_quantile` and `half_life_quantile` (in tokens, infinite
        where α is 1) [M, quantiles of QUANTILES]; `effective_rank` and `relative_rank` [M], means over heads and
        sequences, the latter divided by the largest rank that a state can have, min(K, V, T).
    """
    alpha = log_alpha.exp()
    rank = effective_rank(state).flatten(1).mean(1)
    return {
        "alpha_mean": alpha.flatten(1).mean(1),
        "beta_mean": beta.flatten(1).mean(1),
        "alpha_quantile": _quantiles(alpha, QUANTILES),
        "beta_quantile": _quantiles(beta, QUANTILES),
        # Those of the decay rate, upside down: half-lives themselves may be infinite and cannot be interpolated.
        "half_life_quantile": math.log(2) / _quantiles(log_alpha.abs(), [1 - q for q in QUANTILES]),
        "effective_rank": rank,
        "relative_rank": rank / min(*state.shape[-2:], tokens),
    }


def effective_rank(matrices: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of [..., K, V]; NaN for a matrix of zeros or with a NaN."""
    finite = matrices.isfinite().all(-1).all(-1)  # LAPACK raises where there is none
    # On the CPU, where LAPACK takes 4 ms for 256 × 256: a GPU would take one matrix after another too.
    sizes = torch.linalg.svdvals(matrices.where(finite[..., None, None], 0.0).cpu())
    shares = sizes / sizes.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp().to(matrices.device)


def _quantiles(values: Tensor, quantiles: Sequence[float]) -> Tensor:
    """[M, ...] -> [M, quantiles]"""
    wanted = torch.tensor(quantiles, dtype=values.dtype, device=values.device)
    return values.flatten(1).quantile(wanted, dim=1).T
