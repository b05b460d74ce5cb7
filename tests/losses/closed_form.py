"""A Gaussian student against a Gaussian teacher: everything about it is known exactly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.process import Process, expand


def gaussian(process: Process, x_t: Tensor, t: Tensor, mean: Tensor | float, std: float) -> Prediction:
    """E[x_0 | x_t] for data N(mean, std²)."""
    alpha, sigma = expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return Prediction.of_x0(process, x_t, t, mean + gain * (x_t - alpha * mean))


def log_density(process: Process, x_t: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    """log p_t(x_t) for data N(mean, std²), elementwise."""
    alpha, sigma = expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)
    return torch.distributions.Normal(alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt()).log_prob(x_t)


@dataclass(frozen=True)
class Student:
    """x̂ = a + b·z, re-noised to t with ε, on quadrature nodes of (z, ε) instead of random draws.

    `weight` `(B,)` sums to B, so that a mean over the batch of weight·f is E[f].
    """

    a: Tensor
    b: Tensor
    z: Tensor
    weight: Tensor
    x_hat: Tensor
    x_t: Tensor
    t: Tensor

    @staticmethod
    def on(nodes: tuple[Tensor, Tensor, Tensor], process: Process, t: float, a: list[float], b: float) -> Student:
        z, eps, weight = nodes
        mean = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        std = torch.tensor(b, dtype=torch.float64, requires_grad=True)
        times = torch.full((len(z),), t, dtype=torch.float64)
        x_hat = mean + std * z[:, None]
        x_t = process.add_noise(x_hat, eps[:, None].expand_as(x_hat), times)
        return Student(mean, std, z, weight, x_hat, x_t, times)

    def gradients(self, loss: Tensor) -> tuple[list[float], float]:
        """∂loss/∂a and ∂loss/∂b."""
        a, b = torch.autograd.grad(loss, (self.a, self.b), retain_graph=True)
        return a.tolist(), float(b)


def exact_for_quadratics() -> tuple[Tensor, Tensor, Tensor]:
    """Four equally weighted points with all first and second moments of two unit Gaussians."""
    points = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    return points[:, 0], points[:, 1], torch.ones(4, dtype=torch.float64)


def gauss_hermite(order: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """The tensor product of two Gauss-Hermite rules for unit Gaussians, `order`² points."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    z, eps = np.meshgrid(nodes, nodes, indexing="ij")
    weight = np.outer(weights, weights) / (2 * np.pi) * order**2
    return torch.from_numpy(z.ravel()), torch.from_numpy(eps.ravel()), torch.from_numpy(weight.ravel())
