"""Closed-form teachers: mixtures of isotropic Gaussians, whose denoiser and sometimes whole flow map are exact."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fewstep.diffusion.marginal import Marginal, match_quantiles
from fewstep.diffusion.mixture_file import MixtureTable, read_mixture
from fewstep.diffusion.prediction import Kind, Prediction, at_least_float32
from fewstep.diffusion.process import Process, expand
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition

MAX_DIM = 16
NO_CLASSES = "condition: class labels given, but the mixture has no classes"


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Σ_k w_k·N(m_k, s_k²·I), kept in float64; with labels also the classes' own mixtures.

    Attributes:
        weights: `(K,)` positive; normalised here.
        means: `(K, D)`, D from 1 to 16.
        stds: `(K,)` positive.
        labels: `(K,)` int64, the class of each component, every class from 0 up having one; None: no classes.

    Raises:
        UserError: where one of these does not hold.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    labels: Tensor | None = None
    _copies: dict[torch.device, GaussianMixture] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        weights, means, stds = (x.detach().double() for x in (self.weights, self.means, self.stds))
        _check(weights, means, stds, self.labels)
        object.__setattr__(self, "weights", weights / weights.sum())
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "stds", stds)

    @staticmethod
    def gaussian(mean: Tensor | float, std: float) -> GaussianMixture:
        """One Gaussian, `mean` a number or `(D,)`."""
        means = torch.as_tensor(mean, dtype=torch.float64).reshape(1, -1)
        return GaussianMixture(torch.ones(1), means, torch.tensor([std], dtype=torch.float64))

    @staticmethod
    def from_json(path: str | Path) -> GaussianMixture:
        """A mixture from `{"weights": [...], "means": [[...], ...], "stds": [...], "labels": [...] or null}`.

        Raises:
            UserError: no such file, not JSON, unknown or missing keys, or values that a mixture cannot have.
        """
        table = read_mixture(Path(path))
        try:
            return _of_table(table)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @property
    def dim(self) -> int:
        """D, the dimension of a sample."""
        return self.means.shape[1]

    @cached_property
    def n_classes(self) -> int | None:
        """How many classes there are; this number itself is the null label, the whole mixture."""
        return None if self.labels is None else int(self.labels.max()) + 1

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the whole mixture, `(D,)` float64."""
        return self.weights @ self.means

    @cached_property
    def std(self) -> float:
        """Overall standard deviation: the root of the variance averaged over the D coordinates."""
        spread = (self.means - self.mean).square().mean(1) + self.stds.square()
        return math.sqrt(float(self.weights @ spread))

    def of_class(self, label: int) -> GaussianMixture:
        """The mixture of one class, without classes of its own."""
        assert self.labels is not None
        chosen = self.labels == label
        assert chosen.any()
        return GaussianMixture(self.weights[chosen], self.means[chosen], self.stds[chosen])

    def sample(
        self, n: int, generator: torch.Generator, labels: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """`n` exact samples `(n, D)`, of the classes `labels` `(n,)` where given."""
        device = generator.device
        u = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        noise = torch.randn(n, self.dim, generator=generator, device=device, dtype=torch.float64)
        return self.transform(u, noise, labels).to(dtype)

    def transform(self, u: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples `(B, D)` in float64 from uniforms `(B,)`, which pick the component, and unit noise `(B, D)`."""
        part = self.to(u.device)
        cumulative = part.log_weights(labels, len(u)).exp().cumsum(1)
        chosen = (u.double()[:, None] >= cumulative / cumulative[:, -1:]).sum(1).clamp_max(len(self.weights) - 1)
        return part.means[chosen] + part.stds[chosen, None] * noise.double()

    def sample_labels(self, n: int, generator: torch.Generator) -> Tensor:
        """Classes of `n` samples of the whole mixture, `(n,)` int64."""
        assert self.labels is not None
        device = generator.device
        chosen = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator)
        return self.labels.to(device)[chosen]

    def denoiser(self, process: Process) -> ExactDenoiser:
        """The exact denoiser of this mixture under `process`."""
        return ExactDenoiser(self, process)

    def log_density(self, x: Tensor, t: Tensor, process: Process, condition: Condition | None = None) -> Tensor:
        """The density log p_t(x), `(B,)` float64, of the noised mixture at `x` `(B, D)` and times `t` `(B,)`."""
        labels = None if condition is None else condition.labels
        part = self.to(x.device)
        return part.marginal(t, process).joint(x, part.log_weights(labels, len(x))).logsumexp(1)

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor, process: Process) -> Tensor:
        """X_{t→s}(x), the exact solution of the probability-flow ODE of the whole mixture.

        One component has a closed form in any dimension. In one dimension the map keeps F_t(x), so that it is
        F_s⁻¹(F_t(x)), by bisection in float64.

        Args:
            x: `(B, D)` at times `t`.
            t: `(B,)`.
            s: `(B,)`, cleaner or noisier than `t`.
            process: of both.

        Raises:
            UserError: several components in more than one dimension.
        """
        part, dtype = self.to(x.device), at_least_float32(x).dtype
        source, target = part.marginal(t, process), part.marginal(s, process)
        if len(self.weights) == 1:
            gain = target.stds / source.stds
            return (target.means[:, 0] + gain * (x.double() - source.means[:, 0])).to(dtype)
        if self.dim != 1:
            raise UserError("flow map: closed for one component or in one dimension only")
        return match_quantiles(x.double(), source, target, part.weights.log()).to(dtype)

    def marginal(self, t: Tensor, process: Process) -> Marginal:
        """The noised components at times `t` `(B,)`, in float64."""
        alpha, sigma = process.alpha(t.double())[:, None], process.sigma(t.double())[:, None]
        return Marginal(alpha[..., None] * self.means, ((alpha * self.stds).square() + sigma.square()).sqrt())

    def log_weights(self, labels: Tensor | None, batch: int) -> Tensor:
        """The log w_k for each sample, `(B, K)`, not normalised, −∞ for the components of other classes."""
        if labels is None:
            return self.weights.log().expand(batch, -1)
        if self.labels is None or self.n_classes is None:
            raise UserError(NO_CLASSES)
        every = torch.arange(self.n_classes + 1, device=labels.device)[:, None]
        chosen = (every == self.labels) | (every == self.n_classes)
        return self.weights.log().where(chosen, -math.inf)[labels]

    def to(self, device: torch.device | str) -> GaussianMixture:
        """This mixture with its tables on `device`, made once for each device."""
        device = torch.device(device)
        if device == self.means.device:
            return self
        if device not in self._copies:
            labels = None if self.labels is None else self.labels.to(device)
            copy = GaussianMixture(self.weights.to(device), self.means.to(device), self.stds.to(device), labels)
            self._copies[device] = copy
        return self._copies[device]


@dataclass(frozen=True, eq=False)
class ExactDenoiser:
    """E[x_0 | x_t] of a mixture, in closed form.

    x̂_0 = Σ γ_k·(m_k + α·s_k²/τ_k²·(x − α·m_k)) with τ_k² = α²s_k² + σ² and responsibilities γ_k. A condition with
    class labels selects their components; the null label, and no labels at all, mean the whole mixture.

    Attributes:
        mixture: the data's law.
        process: what x_t means.
    """

    mixture: GaussianMixture
    process: Process

    @property
    def null(self) -> Condition | None:
        """The null condition, batch 1; None for a mixture without classes."""
        n = self.mixture.n_classes
        return None if n is None else Condition.of_labels(torch.tensor([n]))

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """The prediction as v, the one kind from which x̂_0 and ε̂ both follow without loss at every noise level."""
        part, x = self.mixture.to(x_t.device), x_t.double()
        alpha, sigma = self.process.alpha(t.double()), self.process.sigma(t.double())
        marginal = part.marginal(t, self.process)
        gamma = marginal.joint(x, part.log_weights(condition.labels, len(x))).softmax(1)[..., None]
        pull = (x[:, None] - marginal.means) / marginal.stds.square()[..., None]  # (B, K, D)
        shrink = alpha[:, None, None] * part.stds.square()[:, None]
        x0, eps = (gamma * (part.means + shrink * pull)).sum(1), expand(sigma, x) * (gamma * pull).sum(1)
        v = expand(alpha, x) * eps - expand(sigma, x) * x0
        return Prediction(self.process, x_t, t, v.to(at_least_float32(x_t).dtype), Kind.V)


def five_modes(labelled: bool) -> GaussianMixture:
    """Five equal modes of standard deviation 0.15 on the unit circle of the plane, each a class of its own or none."""
    angle = torch.arange(5, dtype=torch.float64) * (2 * math.pi / 5)
    means = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = torch.arange(5) if labelled else None
    return GaussianMixture(torch.ones(5), means, torch.full((5,), 0.15, dtype=torch.float64), labels)


def _of_table(table: MixtureTable) -> GaussianMixture:
    if len({len(row) for row in table.means}) > 1:
        raise UserError("means: every mean needs the same number of coordinates")
    weights, centres, stds = (torch.tensor(x, dtype=torch.float64) for x in (table.weights, table.means, table.stds))
    return GaussianMixture(weights, centres, stds, None if table.labels is None else torch.tensor(table.labels))


def _check(weights: Tensor, means: Tensor, stds: Tensor, labels: Tensor | None) -> None:
    """Every line of `GaussianMixture`'s contract."""
    count = weights.numel()
    if weights.ndim != 1 or count == 0 or not bool((weights.isfinite() & (weights > 0)).all()):
        raise UserError(f"weights: {weights.tolist()} given, a list of positive numbers needed")
    if means.ndim != 2 or len(means) != count or not bool(means.isfinite().all()):
        raise UserError(f"means: shape {tuple(means.shape)} given, ({count}, D) of finite numbers needed")
    if not 1 <= means.shape[1] <= MAX_DIM:
        raise UserError(f"means: {means.shape[1]} dimensions given, 1 to {MAX_DIM} allowed")
    if stds.shape != weights.shape:
        raise UserError(f"stds: shape {tuple(stds.shape)} given, ({count},) needed, one for each weight")
    if not bool((stds.isfinite() & (stds > 0)).all()):
        raise UserError(f"stds: {stds.tolist()} given, positive numbers needed")
    if labels is not None:
        _check_labels(labels, count)


def _check_labels(labels: Tensor, count: int) -> None:
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise UserError(f"labels: {labels.tolist()} given, {count} whole numbers needed, one for each weight")
    classes = labels.unique().tolist()
    if classes != list(range(len(classes))):
        raise UserError(f"labels: classes {classes} given, all of 0, 1, ..., n−1 needed")
