"""Beta-Bernoulli gates (Lee et al. 2018, arXiv 1805.10896), one per channel class, conditioned on a set.

The equations of the ancestor are followed exactly. That the per-example activation is replaced by one statistic of the
whole set is our reading of STAMP (arXiv 2006.12139), whose own equations were not available to us; `shift`, by which a
budget opens and closes whole groups, is ours.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

EULER = 0.5772156649
PRIOR_ALPHA = 1e-4
B_INIT = 0.5413  # softplus of it is 1
# The ancestor uses -1.0, and 2.0 on pretrained weights, for hundreds of epochs; for a few steps a start near "all open"
# leaves the network its function.
A_INIT = 4.0
GAMMA_INIT = 0.1
BETA_INIT = 0.75
_EPS = 1e-6


def expected_gate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean of Kumaraswamy(a, b): b * Gamma(1 + 1/a) * Gamma(b) / Gamma(1 + 1/a + b)."""
    inverse = 1 / a
    return torch.exp(b.log() + torch.lgamma(1 + inverse) + torch.lgamma(b) - torch.lgamma(1 + inverse + b))


def kumaraswamy_kl(a: torch.Tensor, b: torch.Tensor, alpha: float = PRIOR_ALPHA) -> torch.Tensor:
    """KL divergence of Kumaraswamy(a, b) from the sparse prior Beta(alpha, 1), elementwise."""
    return (1 - alpha / a) * (-EULER - torch.digamma(b) - 1 / b) + (a * b).log() - math.log(alpha) - (b - 1) / b


class BetaBernoulliGates(nn.Module):
    """Keep probabilities p = E[pi] * clip(gamma * o + beta) with pi ~ Kumaraswamy(a, b) and o the set's statistic.

    Args:
        statistic: float, [classes]: standardised activation of each class over the set.
        a, b, gamma, beta: float, [classes]: where the parameters start; a and b before their softplus. By default the
            same for all classes.
        shift: float, [classes], added to the logit of p.
        temperature: of the relaxed Bernoulli samples. The ancestor's 0.1 makes nearly every sample 0 or 1, where the
            gradient vanishes: measured on the demo's task, 1.0 ranks channels far better in 20 steps.
    """

    def __init__(
        self,
        statistic: torch.Tensor,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
        gamma: torch.Tensor | None = None,
        beta: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()

        def start(value: torch.Tensor | None, default: float) -> nn.Parameter:
            return nn.Parameter(torch.full_like(statistic, default) if value is None else value.detach().clone())

        self.statistic = nn.Parameter(statistic.detach().clone())
        self.a_unconstrained = start(a, A_INIT)
        self.b_unconstrained = start(b, B_INIT)
        self.gamma = start(gamma, GAMMA_INIT)
        self.beta = start(beta, BETA_INIT)
        self.shift = start(shift, 0.0)
        self.temperature = temperature

    def learned(self) -> list[nn.Parameter]:
        """What a few steps on the target adapt: all but the statistic, which is the data's."""
        return [self.a_unconstrained, self.b_unconstrained, self.gamma, self.beta, self.shift]

    def a_b(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The Kumaraswamy parameters, each [classes]."""
        return F.softplus(self.a_unconstrained.clamp(min=-10)), F.softplus(self.b_unconstrained.clamp(-10, 50))

    def _logit(self, pi: torch.Tensor) -> torch.Tensor:
        on_set = (self.gamma * self.statistic + self.beta).clamp(_EPS, 1 - _EPS)
        return torch.logit((pi * on_set).clamp(_EPS, 1 - _EPS)) + self.shift

    def probability(self) -> torch.Tensor:
        """Expected keep probability of every class, [classes]."""
        return torch.sigmoid(self._logit(expected_gate(*self.a_b()))).clamp(_EPS, 1 - _EPS)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """One relaxed mask z in (0, 1) for the whole set, [classes]; differentiable in every parameter."""
        a, b = self.a_b()
        u, v = torch.rand((2, a.numel()), generator=generator).to(a).clamp(_EPS, 1 - _EPS)
        pi = (1 - u ** (1 / b)).clamp(_EPS, 1 - _EPS) ** (1 / a)
        return torch.sigmoid((self._logit(pi) + torch.logit(v)) / self.temperature)

    def kl(self) -> torch.Tensor:
        """Sum of the classes' KL divergences from the sparse prior."""
        return kumaraswamy_kl(*self.a_b()).sum()
