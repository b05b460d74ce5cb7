"""A discriminator: heads on the features of a score network, its own, a copy's or the frozen teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.process import State
from fewstep.diffusion.times import Law, Uniform
from fewstep.losses.adversarial import Adversarial, approximate_r1, discriminator_loss, generator_loss, r1
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.heads import Heads
from fewstep.models.players import Player
from fewstep.models.taps import FeatureTap, block_names
from fewstep.rng import Rng

_R1_STD = 0.1  # size of the finite difference; small beside noised samples, large beside rounding


@dataclass(frozen=True)
class Judged:
    """Clean samples `(B, *)` that a discriminator is shown, and what it is told of them."""

    x: Tensor
    condition: Condition


@dataclass(frozen=True)
class Smoothness:
    """What keeps a discriminator smooth, at real samples and at fakes.

    Attributes:
        real: γ of R1 (Mescheder et al. 2018).
        fake: γ of R2, the same at fakes.
        of_features: ‖∇D‖² with respect to the heads' inputs, exact (ADD); else to the noisy sample, by a difference.
    """

    real: float = 0.0
    fake: float = 0.0
    of_features: bool = False


@dataclass(frozen=True, eq=False)
class Discriminator:
    """Logits of noisy samples, read off a network's features.

    Attributes:
        backbone: the tapped network; gradient reaches its input, and its weights where they are trained.
        heads: the trained heads.
        times: law of the noise levels it judges at.
        loss: the pair of losses, for itself and for the generator.
        smoothness: its penalties.
        trains_backbone: its own loss may move the backbone; else the backbone is only read in `pay`.
    """

    backbone: NetworkDenoiser
    heads: Heads
    times: Law
    loss: Adversarial = Adversarial.NON_SATURATING
    smoothness: Smoothness = Smoothness()
    trains_backbone: bool = True

    @staticmethod
    def on(
        backbone: NetworkDenoiser,
        example: Batch,
        taps: Sequence[str] = (),
        outputs: int = 1,
        modulated: bool = False,
    ) -> Discriminator:
        """A discriminator on `backbone` at all its noise levels, its heads sized by one sample `(1, *)`.

        Args:
            backbone: of its features.
            example: of the data.
            taps: sub-modules to read; none is the bottleneck, `blocks` is every block.
            outputs: logits of each head.
            modulated: the heads hear the noise level and the class.

        Raises:
            UserError: the backbone has no sub-module of a name in `taps`.
        """
        names = block_names(backbone.network, backbone.family) if tuple(taps) == ("blocks",) else tuple(taps)
        tapped = replace(backbone, tap=_tap(backbone, names)) if names else backbone.tapped()
        with torch.no_grad():
            tapped(example.x, tapped.process.times(tapped.process.t_max / 2, example.x), example.condition)
        heads = Heads.like(tapped.features(), outputs=outputs, classes=_classes(backbone) if modulated else None)
        return Discriminator(tapped, heads, Uniform(tapped.process))

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits `(B, K)` of `x_t` `(B, *)` at times `t` `(B,)`; real is positive."""
        return self.heads(self._features(x_t, t, condition), self.backbone.process.ratio(t).log(), condition.labels)

    def noised(self, x: Tensor, rng: Rng) -> State:
        """Clean samples `(B, *)`, each diffused to a random time of its own (DMD2, section 4.3)."""
        t = self.times(rng.uniform(len(x)))
        return State(self.backbone.process.add_noise(x, rng.normal(x), t), t)

    def of_clean(self, x: Tensor, condition: Condition, rng: Rng) -> Tensor:
        """Logits `(B, K)` of clean samples `(B, *)`, diffused first."""
        noisy = self.noised(x, rng)
        return self(noisy.x, noisy.t, condition)

    def losses(
        self, kind: Adversarial, batch: Batch, fake: Tensor, rng: Rng, r1_weight: float = 0.0
    ) -> dict[str, Tensor]:
        """What the discriminator pays: telling data from clean fakes `(B, *)`, and the R1 penalty at data.

        Real and fake samples take one pass. γ = `r1_weight` as in R1 (Mescheder et al. 2018).
        """
        real, made = self.noised(batch.x, rng), self.noised(fake, rng)
        twice = Condition.cat([batch.condition, batch.condition])
        real_logits, fake_logits = self(torch.cat([real.x, made.x]), torch.cat([real.t, made.t]), twice).chunk(2)
        losses = {"discriminator": discriminator_loss(kind, real_logits, fake_logits)}
        if r1_weight:
            noise = rng.normal(real.x)
            penalty = approximate_r1(lambda x: self(x, real.t, batch.condition), real.x, real_logits, _R1_STD, noise)
            losses["r1"] = 0.5 * r1_weight * penalty
        return losses

    def pay(self, real: Judged, fake: Judged, rng: Rng, output: int = 0) -> dict[str, Tensor]:
        """What the discriminator pays in its own turn, by name: for its verdicts, and for being steep.

        Each real sample is diffused to the time of a fake one, so that a pair differs by its samples alone; all take
        one pass. Gradient reaches the heads, and the backbone where `trains_backbone`; never the samples.

        Args:
            real: what should be called real.
            fake: as many fakes.
            rng: of times and noise.
            output: the question asked, of the heads' `outputs`.
        """
        t = self.times(rng.uniform(len(fake.x))).repeat(2)
        x, condition = torch.cat([real.x, fake.x]).detach(), Condition.cat([real.condition, fake.condition])
        noise = torch.cat([rng.normal(real.x), rng.normal(fake.x)])  # at once, it would depend on who shares the batch
        x_t = self.backbone.process.add_noise(x, noise, t)
        shown = _Shown(x_t, t, condition, output)
        with torch.set_grad_enabled(self.trains_backbone):
            features = self._features(x_t, t, condition)
        logits = self._verdict(features, shown)
        losses = {"discriminator": discriminator_loss(self.loss, *logits.chunk(2))}
        half = len(fake.x)
        for name, gamma, rows in (
            ("r1", self.smoothness.real, slice(0, half)),
            ("r2", self.smoothness.fake, slice(half, None)),
        ):
            if gamma:
                there, own = shown.rows(rows), tuple(feature[rows] for feature in features)
                of_features = self.smoothness.of_features
                norm = self._norm_by_features(own, there) if of_features else self._norm(there, logits[rows], rng)
                losses[name] = 0.5 * gamma * norm
        return losses

    def fool(self, fake: Judged, rng: Rng, real: Judged | None = None, output: int = 0) -> Tensor:
        """What the generator pays for fakes with gradient, a scalar; `real` is what the relativistic loss compares to.

        Arguments as for `pay`.
        """
        t = self.times(rng.uniform(len(fake.x)))
        logits = self._judge(fake, t, rng, output)
        if self.loss is not Adversarial.RELATIVISTIC:
            return generator_loss(self.loss, logits)
        assert real is not None, "the relativistic loss compares each fake with a real sample"
        with torch.no_grad():
            others = self._judge(real, t, rng, output)
        return generator_loss(self.loss, logits, others)

    def players(self) -> dict[str, Player]:
        """Who moves in its turn, by name: the heads, and the backbone where it is trained."""
        players = {"discriminator": Player.of(self.heads)}
        return players | ({"backbone": Player(self.backbone.parameters())} if self.trains_backbone else {})

    def _judge(self, clean: Judged, t: Tensor, rng: Rng, output: int) -> Tensor:
        x_t = self.backbone.process.add_noise(clean.x, rng.normal(clean.x), t)
        shown = _Shown(x_t, t, clean.condition, output)
        return self._verdict(self._features(x_t, t, clean.condition), shown)

    def _features(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        return self.backbone.features_of(x_t, t, condition)

    def _verdict(self, features: tuple[Tensor, ...], shown: _Shown) -> Tensor:
        """Logits `(B, K)` of the output that is asked for."""
        log_ratio = self.backbone.process.ratio(shown.t).log()
        return self.heads(features, log_ratio, shown.condition.labels).chunk(self.heads.outputs, dim=1)[shown.output]

    def _norm(self, shown: _Shown, logits: Tensor, rng: Rng) -> Tensor:
        """E‖∇D‖² with respect to the noisy samples, by a difference."""

        def verdict(x_t: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.trains_backbone):
                features = self._features(x_t, shown.t, shown.condition)
            return self._verdict(features, shown)

        return approximate_r1(verdict, shown.x_t, logits, _R1_STD, rng.normal(shown.x_t))

    def _norm_by_features(self, features: tuple[Tensor, ...], shown: _Shown) -> Tensor:
        """E‖∇D‖² with respect to each head's own input, averaged over heads."""
        inputs = tuple(feature if feature.requires_grad else feature.requires_grad_() for feature in features)
        columns = self._verdict(inputs, shown).split(1, dim=1)
        return 2 * torch.stack([r1(column, one) for column, one in zip(columns, inputs, strict=True)]).mean()


@dataclass(frozen=True)
class _Shown:
    """Noisy samples as the backbone sees them, and which of the heads' outputs is asked for."""

    x_t: Tensor
    t: Tensor
    condition: Condition
    output: int

    def rows(self, rows: slice) -> _Shown:
        return _Shown(self.x_t[rows], self.t[rows], self.condition.rows(rows), self.output)


def _tap(backbone: NetworkDenoiser, names: tuple[str, ...]) -> FeatureTap:
    return FeatureTap(backbone.network, names, backbone.family.tap_element)


def _classes(backbone: NetworkDenoiser) -> int:
    """Labels that a condition may carry, the null label among them; 0 without classes."""
    labels = None if backbone.null is None else backbone.null.labels
    return 0 if labels is None else int(labels) + 1
