"""Whether a run is well: figures and pictures of the student's samples as its judges see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.loader import Loader
from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import sample
from fewstep.losses.denoising import denoising
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance import Guided
from fewstep.models.guidance_input import at_scale, middle
from fewstep.models.rollout import Rolled
from fewstep.rng import Rng
from fewstep.training.finished import sampler_of
from fewstep.training.loop import TrainState
from fewstep.training.method import Critics

BINS = 4
WINDOW = (0.02, 0.98)  # of noise levels, as shares of the process's range: where DMD2 judges samples
_SEED = 20_000_003  # beside the run's: its own draws are never met again


@dataclass(frozen=True)
class Noised:
    """The student's samples `x` `(N, *)` with `noise` at times `t` `(N,)`: `x_t`, which all judges are shown."""

    x: Tensor
    noise: Tensor
    t: Tensor
    x_t: Tensor


@dataclass(frozen=True)
class Reading:
    """One look at the panel.

    Attributes:
        figures: scalars `()` on the device, by name.
        rows: what is shown of every sample `(N, *)`, by title; noise rises along N.
    """

    figures: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]

    def read(self) -> dict[str, float]:
        """The figures on the host, in one transfer; this waits for the device."""
        values = torch.stack([value.float() for value in self.figures.values()]).tolist()
        return dict(zip(self.figures, values, strict=True))


@dataclass(frozen=True)
class Panel:
    """The same real samples, noise and noise levels at every reading, so that what changes is the networks.

    Nothing is drawn from the run's streams and nothing of the run is written to.

    Attributes:
        batch: N real samples, whose conditions the student's samples are made for.
        seed: of all noise.
    """

    batch: Batch
    seed: int

    @staticmethod
    def of(state: TrainState) -> Panel:
        """Of a run, with its `health.samples`."""
        config = state.config
        loader = Loader(state.loader.dataset, config.health.samples, seed=config.run.seed)
        return Panel(next(iter(loader)).to(state.accelerator.device), config.run.seed + _SEED)

    @torch.no_grad()
    def read(self, state: TrainState) -> Reading:
        """The student as it is now, not its average: that is what its judges learn from."""
        with state.accelerator.autocast():
            made, critics = self._samples(state), state.method.critics
            figures, rows = drift(made.x, self.batch.x), {"student's sample": made.x}
            if critics.teacher is not None:
                seen = self._scores(state, critics.teacher, critics.fake_score, made)
                figures, rows = {**figures, **seen.figures}, {**rows, **seen.rows}
            figures |= self._verdict(critics, made.x)
        rows["real, same condition"] = self.batch.x
        return Reading({f"health/{name}": value for name, value in figures.items()}, rows)

    def _samples(self, state: TrainState) -> Rolled:
        student, rng = state.method.student, Rng(self.seed, self.batch.x.device)
        sampler = sampler_of(state.config, student.process)
        generator = torch.Generator(self.batch.x.device).manual_seed(self.seed + 1)
        x = sample(at_scale(student), sampler, rng.normal(self.batch.x), self.batch.condition, generator)
        return Rolled(x, len(sampler.times) - 1)

    def _scores(self, state: TrainState, teacher: Guided, fake_score: NetworkDenoiser | None, made: Rolled) -> Reading:
        """What the teacher says of the student's noised samples, and the fake score where there is one."""
        noised, condition = self._noised(made.x, teacher.process), self.batch.condition
        alone = teacher.denoiser(noised.x_t, noised.t, condition)
        guided = self._guided(state, teacher)(noised.x_t, noised.t, condition)
        figures = {"surprise": loss(alone, noised) / self._real_loss(teacher)}
        rows = {"with noise": noised.x_t, "teacher's estimate": guided.x0}
        if fake_score is None:
            return Reading(figures, rows)
        fake = fake_score(noised.x_t, noised.t, made.told(condition, fake_score))
        return Reading(figures | gap(fake, guided, made.x) | floor(fake, alone, noised),
                       rows | {"fake score's estimate": fake.x0})  # fmt: skip

    def _noised(self, x: Tensor, process: Process) -> Noised:
        """At noise levels that rise evenly over the window."""
        low, high = WINDOW
        shares = low + (high - low) * (torch.arange(len(x), device=x.device) + 0.5) / len(x)
        noise, t = Rng(self.seed + 2, x.device).normal(x), process.at(shares)
        return Noised(x, noise, t, process.add_noise(x, noise, t))

    def _real_loss(self, teacher: Guided) -> Tensor:
        """The unguided teacher's on real samples, with the same noise as the student's."""
        noised = self._noised(self.batch.x, teacher.process)
        return loss(teacher.denoiser(noised.x_t, noised.t, self.batch.condition), noised)

    def _guided(self, state: TrainState, teacher: Guided) -> Guided:
        """Under the guidance that the samples were made for; each of its own scale where there is a range."""
        scales = state.method.student.guidance_range
        if scales is not None:
            return teacher.at(middle(scales))
        return teacher.drawn(Rng(self.seed + 3, self.batch.x.device), len(self.batch.x))

    def _verdict(self, critics: Critics, x: Tensor) -> dict[str, Tensor]:
        """A discriminator's, at the same noise on the real samples and on the student's."""
        if critics.discriminator is None:
            return {}
        real, fake = (
            critics.discriminator.of_clean(of, self.batch.condition, Rng(self.seed + 4, x.device))
            for of in (self.batch.x, x)
        )
        return verdict(real, fake)


def drift(made: Tensor, real: Tensor) -> dict[str, Tensor]:
    """How samples `(N, *)` differ from real ones of the same conditions in their first two moments.

    `mean_shift` is the mean value's difference, `std_ratio` the ratio of all values' standard deviations, and
    `spread_ratio` the ratio of those across samples: what is left when each pixel's own mean is taken away.
    """
    made, real = made.float(), real.float()
    return {
        "mean_shift": made.mean() - real.mean(),
        "std_ratio": made.std() / real.std(),
        "spread_ratio": _spread(made) / _spread(real),
    }


def _spread(x: Tensor) -> Tensor:
    return x.var(dim=0).mean().sqrt()


def gap(fake: Prediction, real: Prediction, x: Tensor) -> dict[str, Tensor]:
    """E|x̂_0,fake − x̂_0,real| `()`, over all samples and by bin of the noise level, which rises along the batch.

    `gap_share` is it as a share of E|x̂_0,real − x|, by which DMD divides its gradient.
    """
    each = (fake.x0 - real.x0).abs().flatten(1).mean(1)
    low, high = WINDOW
    edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
    names = [f"gap/{a:.2f}-{b:.2f}" for a, b in pairwise(edges)]
    return {"gap": each.mean(), "gap_share": each.mean() / (real.x0 - x).abs().mean()} | {
        name: part.mean() for name, part in zip(names, each.chunk(BINS), strict=True)
    }


def floor(fake: Prediction, teacher: Prediction, noised: Noised) -> dict[str, Tensor]:
    """The fake score's loss `()` and that of the unguided teacher on the same samples and noise.

    `fake_loss_above_teacher` is their difference: below 0 the fake score knows the student better than a model that
    never saw its samples.
    """
    own, others = loss(fake, noised, fake.kind), loss(teacher, noised, fake.kind)
    return {"fake_loss": own, "teacher_loss": others, "fake_loss_above_teacher": own - others}


def loss(prediction: Prediction, noised: Noised, kind: Kind | None = None) -> Tensor:
    """The plain denoising loss `()` in the space of `kind`; None: the prediction's own."""
    return denoising(prediction, noised.x, noised.noise, kind or prediction.kind)


def verdict(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """From logits `(N, K)`: the shares of real and of fake samples called rightly, and of pairs ranked rightly.

    Of a relativistic loss only the last one means anything.
    """
    return {
        "discriminator_real": (real > 0).float().mean(),
        "discriminator_fake": (fake < 0).float().mean(),
        "discriminator_ranked": (real[:, None] > fake[None]).float().mean(),
    }
