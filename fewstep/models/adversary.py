"""The settings that adversarial terms share, and the discriminator they make."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Denoiser
from fewstep.diffusion.times import Law, LogitNormal, Uniform
from fewstep.losses.adversarial import Adversarial
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.discriminator import Discriminator, Smoothness
from fewstep.section import Needs, Section, Window

_ON = Needs("adversarial_weight")


class Adversary(Section):
    """A discriminator: where its features come from, at what noise it judges, its loss and its penalties.

    The config of a method that has an adversarial term inherits these fields beside its own.
    """

    adversarial_weight: float = Field(default=1.0, ge=0)
    """Weight of what the student pays for being recognised; 0 is no discriminator."""
    taps: Annotated[tuple[str, ...], _ON] = ()
    """Sub-modules whose output has a head; none: the bottleneck; `[blocks]`: every block (LADD)."""
    modulated: Annotated[bool, _ON] = False
    """Whether the heads are told the noise level and the class (LADD), which the features know already."""
    adversarial_loss: Annotated[Adversarial, _ON] = Adversarial.NON_SATURATING
    """Pair of losses; ADD's is `hinge`, that of R3GAN and of adversarial self-distillation `relativistic`."""
    noise_levels: Annotated[Literal["logit_normal", "uniform"], _ON] = "logit_normal"
    """Law of the noise that real and fake samples are judged under, as shares of the process's range."""
    logit_mean: Annotated[float, _ON, Needs("noise_levels", "logit_normal")] = 1.0
    """Mean of the share's logit; above 0 is mostly structure, below 0 mostly texture (LADD: 1)."""
    logit_std: Annotated[float, _ON, Needs("noise_levels", "logit_normal")] = Field(default=1.0, gt=0)
    """Standard deviation of the share's logit (LADD: 1)."""
    judged_window: Annotated[Window, _ON, Needs("noise_levels", "uniform")] = (0.0, 1.0)
    """Window of the uniform law; (0, 0.01) is nearly clean samples, which ADD judges."""
    r1_weight: Annotated[float, _ON] = Field(default=0.0, ge=0)
    """γ of the gradient penalty at real samples, γ/2·E‖∇D‖²."""
    r2_weight: Annotated[float, _ON] = Field(default=0.0, ge=0)
    """γ of the same penalty at fakes (R3GAN)."""
    penalty: Annotated[Literal["samples", "features"], _ON] = "samples"
    """With respect to what: noisy samples, by a difference (APT), or the heads' inputs, exactly (ADD, γ = 1e-5)."""

    def discriminator(
        self, backbone: NetworkDenoiser, example: Batch, trains_backbone: bool, outputs: int = 1
    ) -> Discriminator:
        """A discriminator of these settings, its heads sized by one sample `(1, *)`.

        Raises:
            UserError: `taps` names what the network does not have.
        """
        made = Discriminator.on(backbone, example, self.taps, outputs, self.modulated)
        smoothness = Smoothness(self.r1_weight, self.r2_weight, self.penalty == "features")
        return replace(
            made,
            times=self.law(backbone.process),
            loss=self.adversarial_loss,
            smoothness=smoothness,
            trains_backbone=trains_backbone,
        )

    def law(self, process: Process) -> Law:
        """Of the noise levels."""
        if self.noise_levels == "uniform":
            return Uniform(process, *self.judged_window)
        return LogitNormal(process, self.logit_mean, self.logit_std)


class FeatureAdversary(Adversary):
    """An adversary that chooses the network whose features it reads."""

    backbone: Annotated[Literal["frozen", "trained"], _ON] = "frozen"
    """Whose features: the frozen teacher's (LADD), or those of a copy that the heads train too (APT): under
    `student.lora` of one more adapter. Of a closed-form teacher the student's first weights are the copy."""

    def against(
        self, student: NetworkDenoiser, teacher: Denoiser | None, example: Batch, outputs: int = 1
    ) -> Discriminator | None:
        """The discriminator of the student's samples, with `outputs` logits of each head; None at weight 0.

        Raises:
            UserError: `taps` names what the network does not have.
        """
        if not self.adversarial_weight:
            return None
        trained = self.backbone == "trained"
        return self.discriminator(_features(student, teacher, trained), example, trained, outputs)


def _features(student: NetworkDenoiser, teacher: Denoiser | None, trained: bool) -> NetworkDenoiser:
    if isinstance(teacher, NetworkDenoiser):
        return teacher.branch("backbone") if trained else teacher
    copied = student.copy()  # fitted to the teacher
    copied.network.requires_grad_(trained)
    return copied
