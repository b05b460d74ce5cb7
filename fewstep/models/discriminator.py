"""A discriminator: heads on the bottleneck features of a score network, its own or the frozen teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.process import State
from fewstep.diffusion.times import Law, Uniform
from fewstep.losses.adversarial import Adversarial, approximate_r1, discriminator_loss
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.heads import Heads
from fewstep.rng import Rng

_R1_STD = 0.1  # size of the finite difference; small beside noised samples, large beside rounding


@dataclass(frozen=True, eq=False)
class Discriminator:
    """Logits of noisy samples, read off a network's features.

    Attributes:
        backbone: the tapped network; gradient reaches its input, and its weights where they are trained.
        heads: the trained heads.
        times: law of the noise levels it judges at.
    """

    backbone: NetworkDenoiser
    heads: nn.Module
    times: Law

    @staticmethod
    def on(backbone: NetworkDenoiser, example: Batch) -> Discriminator:
        """A discriminator on `backbone` at all its noise levels, its heads sized by one sample `(1, *)`."""
        tapped = backbone.tapped()
        with torch.no_grad():
            tapped(example.x, tapped.process.times(tapped.process.t_max / 2, example.x), example.condition)
        return Discriminator(tapped, Heads.like(tapped.features()), Uniform(tapped.process))

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits `(B, K)` of `x_t` `(B, *)` at times `t` `(B,)`; real is positive."""
        self.backbone(x_t, t, condition)
        return self.heads(self.backbone.features())

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
