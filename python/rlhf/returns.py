"""Estimators of advantages beside GAE."""

import torch
from torch import Tensor

ESTIMATORS = ("gae", "total_return")


def total_return(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T]: every token is weighted with the discounted reward of its whole response.

        G = Σ_t γ^t r_t,   A_t = G − v_t

    GAE drops what came before a token, which is right where rewards depend on the past alone. Credit by attention
    depends on later tokens: what it gives to earlier ones is correlated with a token, and dropping it biases the
    gradient. This keeps all of it, at the price of more variance. 0 where masked.
    """
    places = (mask.cumsum(1) - 1).clamp(min=0)
    total = torch.where(mask, rewards * gamma**places, 0).sum(1, keepdim=True)
    return torch.where(mask, total - values, 0), torch.where(mask, total, 0)
