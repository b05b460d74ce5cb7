"""A method against an exact answer: distil a mixture whose denoiser is closed, sample, and judge the samples."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep import registry
from fewstep.commands.configs import find
from fewstep.config import RunConfig
from fewstep.config_file import load
from fewstep.data.mixture import MixtureSet
from fewstep.data.pairs import Pair, save_pairs
from fewstep.diffusion.gaussian import ExactDenoiser, GaussianMixture
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.errors import UserError
from fewstep.evaluation.metrics import energy_distance
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance import Guided
from fewstep.models.guidance_input import at_scale, middle
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.vector_network import VectorConfig, VectorNetwork
from fewstep.training.assemble import EMA, assemble
from fewstep.training.loop import TrainState, train
from fewstep.training.method import Claims
from fewstep.training.opening import Sources

SAMPLES = 4096
WARM_STEPS = 1000
PAIRS, PAIR_STEPS = 32768, 32
FINE_STEPS = 64


@dataclass(frozen=True)
class Samples:
    """What was drawn, `(4096, D)` each, of the same labels `(4096,)` where the mixture has classes.

    Attributes:
        student: from `noise`, by the method's sampler.
        teacher: from `noise`, by the exact teacher's Euler at the same steps.
        exact: of the target: the mixture itself, or what the guided teacher makes of it in many steps.
        exact_again: of the target, independently.
        mapped: the exact flow map of `noise`, where the method promises it and it is closed; else None.
    """

    student: Tensor
    teacher: Tensor
    exact: Tensor
    exact_again: Tensor
    mapped: Tensor | None
    labels: Tensor | None


@dataclass(frozen=True)
class Verdict:
    """What a verification found.

    Attributes:
        student_energy: energy distance of the student's samples to exact ones.
        teacher_energy: the same of the exact teacher's Euler at the same steps.
        floor_energy: of exact samples to exact samples.
        map_error: mean distance to the exact flow map, for methods that promise it; else None.
        tolerance: the largest student energy that passes.
    """

    method: str
    steps: int
    dim: int
    student_energy: float
    teacher_energy: float
    floor_energy: float
    map_error: float | None
    passed: bool
    tolerance: float
    seconds: float


@dataclass(frozen=True)
class Distilled:
    """A trained student of an exact teacher."""

    state: TrainState
    mixture: GaussianMixture
    teacher: ExactDenoiser
    seed: int


def distil(name: str, mixture: GaussianMixture, steps: int, seed: int, overrides: Sequence[str] = ()) -> Distilled:
    """Warm a small network up on the exact teacher, and distil it by the method's ordinary path.

    Raises:
        UserError: the method needs classes, and the mixture has none.
    """
    words = [f"student.steps={steps}", f"run.seed={seed}", *overrides]
    config = load(find(Path(f"verify/{name}")), words)
    if claims_of(config).guided and mixture.labels is None:
        raise UserError(f"--mixture: {name} distils guidance, which needs a mixture with labels")
    torch.manual_seed(seed)
    teacher = mixture.denoiser(Flow())
    student = warm_network(mixture, teacher, seed)
    with _with_pairs(config, mixture, teacher) as complete:
        state = assemble(complete, Sources(MixtureSet(mixture, seed), teacher, student), Accelerator(cpu=True))
        for _ in train(state):
            pass
    return Distilled(state, mixture, teacher, seed)


def claims_of(config: RunConfig) -> Claims:
    """What the run's method promises."""
    return registry.get(config.method.name).claims


@contextmanager
def _with_pairs(config: RunConfig, mixture: GaussianMixture, teacher: ExactDenoiser) -> Iterator[RunConfig]:
    """The run's config, with a file of the exact teacher's pairs for methods that learn from those."""
    if not claims_of(config).pairs:
        yield config
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.safetensors"
        save_pairs(path, _make_pairs(config, mixture, teacher))
        method = config.method.model_copy(update={"pairs": path})
        yield config.model_copy(update={"method": method})


@torch.no_grad()
def _make_pairs(config: RunConfig, mixture: GaussianMixture, teacher: ExactDenoiser) -> Pair:
    generator = torch.Generator().manual_seed(config.run.seed + 2000)
    labels = None if mixture.labels is None else mixture.sample_labels(PAIRS, generator)
    condition = Condition.none() if labels is None else Condition.of_labels(labels)
    noise = torch.randn(PAIRS, mixture.dim, generator=generator)
    guided = Guided(teacher, teacher.null, config.teacher.guidance)
    return Pair(noise, sample(guided, Sampler.of(Flow(), PAIR_STEPS, "heun"), noise, condition), condition)


def warm_network(mixture: GaussianMixture, teacher: ExactDenoiser, seed: int) -> NetworkDenoiser:
    """A small network that predicts what the exact teacher does: the pretrained model every method starts from.

    A tenth of its samples are pure noise, where every sampler starts and uniform times never come; an eighth have lost
    their label.
    """
    mean = tuple(float(m) for m in mixture.mean)
    network = VectorNetwork(VectorConfig(mixture.dim, mixture.n_classes or 0, mean, mixture.std))
    denoiser = make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))
    network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, WARM_STEPS)
    generator, data = torch.Generator().manual_seed(seed), MixtureSet(mixture, seed + 1)
    for step in range(WARM_STEPS):
        batch = data.batch(range(step * 512, (step + 1) * 512))
        t = torch.rand(512, generator=generator)
        t[:51] = 1.0
        condition = Condition.none()
        if batch.labels is not None and mixture.n_classes is not None:
            dropped = torch.rand(512, generator=generator) < 0.125
            condition = Condition.of_labels(batch.labels.where(~dropped, mixture.n_classes))
        x_t = Flow().add_noise(batch.images, torch.randn(batch.images.shape, generator=generator), t)
        loss = (denoiser(x_t, t, condition).velocity - teacher(x_t, t, condition).velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return denoiser


@torch.no_grad()
def draw(distilled: Distilled, steps: int) -> Samples:
    """Student, teacher and exact samples; student and teacher start from the same noise."""
    state, mixture, teacher = distilled.state, distilled.mixture, distilled.teacher
    generator = torch.Generator().manual_seed(distilled.seed + 1000)
    labels = None if mixture.labels is None else mixture.sample_labels(SAMPLES, generator)
    condition = Condition.none() if labels is None else Condition.of_labels(labels)
    noise = torch.randn(SAMPLES, mixture.dim, generator=generator)
    student, method = state.method.student, state.method
    with method.averages[EMA].swapped():
        sampler = method.sampler(state.config.method, student.process, steps)
        made = sample(at_scale(student), sampler, noise, condition, generator)
    scale = state.config.teacher.guidance if student.guidance_range is None else middle(student.guidance_range)
    guided = Guided(teacher, teacher.null, scale if method.claims.guided else 1.0)
    taught = sample(guided, Sampler(Flow().step_list(steps), "euler"), noise, condition)
    exact, again = (_target(guided, mixture, labels, condition, generator) for _ in range(2))
    return Samples(made, taught, exact, again, _mapped(method.claims, mixture, noise, labels), labels)


def _target(
    guided: Guided, mixture: GaussianMixture, labels: Tensor | None, condition: Condition, generator: torch.Generator
) -> Tensor:
    """Samples that a perfect student would make: of the mixture, or of its guided ODE in many steps."""
    if guided.scale == 1.0:
        return mixture.sample(SAMPLES, generator, labels)
    noise = torch.randn(SAMPLES, mixture.dim, generator=generator)
    return sample(guided, Sampler.of(Flow(), FINE_STEPS, "heun"), noise, condition)


def _mapped(claims: Claims, mixture: GaussianMixture, noise: Tensor, labels: Tensor | None) -> Tensor | None:
    if not claims.exact_map or labels is not None or (mixture.dim > 1 and len(mixture.weights) > 1):
        return None
    return mixture.flow_map(noise, torch.ones(len(noise)), torch.zeros(len(noise)), Flow())


def judge(name: str, steps: int, samples: Samples, seconds: float) -> Verdict:
    """The energies, and whether the student passes its bar."""
    made = (samples.student, samples.teacher, samples.exact_again)
    student, taught, floor = (energy_distance(x, samples.exact) for x in made)
    tolerance = _tolerance(name, steps, taught, floor)
    error = None if samples.mapped is None else float((samples.student - samples.mapped).norm(dim=1).mean())
    dim = samples.exact.shape[1]
    return Verdict(name, steps, dim, student, taught, floor, error, student <= tolerance, tolerance, round(seconds, 2))


def _tolerance(name: str, steps: int, teacher: float, floor: float) -> float:
    """0.03 (distribution matching) or 0.06 of the teacher's energy at one step, 0.35 of it at more.

    Where the teacher itself is below 9 floors, 3 floors pass. Guidance methods imitate the guided teacher at the same
    steps with half its evaluations: 1.2 of its energy, or 3 floors.
    """
    cls = registry.get(name)
    if cls.claims.guided:
        return max(1.2 * teacher, 3 * floor)
    one_step = 0.03 if cls.family == "distribution" else 0.06
    share = one_step if steps == 1 else 0.35
    return max(share * teacher, 3 * floor) if teacher < 9 * floor else share * teacher


def verify(
    name: str, mixture: GaussianMixture, steps: Sequence[int], seed: int, overrides: Sequence[str] = ()
) -> Iterator[tuple[Verdict, Samples]]:
    """Verdicts at several step counts; a method whose one student serves them all is trained once."""
    clock, distilled = time.perf_counter(), None
    for count in steps:
        if distilled is None or not registry.get(name).claims.one_student:
            distilled = distil(name, mixture, count, seed, overrides)
        samples = draw(distilled, count)
        yield judge(name, count, samples, time.perf_counter() - clock), samples
        clock = time.perf_counter()
