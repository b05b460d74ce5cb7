"""`fewstep verify`: a method against an exact answer, on a mixture whose denoiser is known in closed form."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from fewstep import registry
from fewstep.commands.configs import find
from fewstep.commands.report import require_writable, write_json
from fewstep.config import RunConfig, load
from fewstep.data.mixture import MixtureSet
from fewstep.diffusion.gaussian import ExactDenoiser, GaussianMixture, five_modes
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.diffusion.solvers import Denoiser, Sampler, sample
from fewstep.evaluation.metrics import energy_distance
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import at_scale
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.vector_network import VectorConfig, VectorNetwork
from fewstep.training.assemble import EMA, Sources, assemble
from fewstep.training.loop import TrainState, train

SAMPLES = 4096
WARM_STEPS = 1000


@dataclass(frozen=True)
class Samples:
    """`(4096, D)` each, of the same labels `(4096,)` where the mixture has classes."""

    student: Tensor
    teacher: Tensor
    exact: Tensor
    exact_again: Tensor
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


def run(name: str, mixture: Path | None, steps: int, seed: int, out: Path | None, save: Path | None) -> None:
    """Verify one method and print the verdict; exit code 1 if it fails."""
    registry.get(name)
    require_writable("--json", out)
    require_writable("--save-samples", save)
    clock = time.perf_counter()
    target = GaussianMixture.from_json(mixture) if mixture else five_modes(labelled=False)
    config = load(find(Path(f"verify/{name}")), [f"student.steps={steps}", f"run.seed={seed}"])
    samples = distil(config, target, steps, seed)
    verdict = judge(name, steps, samples, time.perf_counter() - clock)
    if save is not None:
        _save(save, samples)
    _report(verdict, out)
    if not verdict.passed:
        raise typer.Exit(1)


def distil(config: RunConfig, mixture: GaussianMixture, steps: int, seed: int) -> Samples:
    """Warm a small network up on the exact teacher, distil it by the method's ordinary path, and sample both."""
    torch.manual_seed(seed)
    teacher = mixture.denoiser(Flow())
    student = warm_network(mixture, teacher, seed)
    accelerator = Accelerator(cpu=True)
    state = assemble(config, Sources(MixtureSet(mixture, seed), teacher, student), accelerator)
    for _ in train(state):
        pass
    return draw(state, mixture, teacher, steps, seed)


def warm_network(mixture: GaussianMixture, teacher: ExactDenoiser, seed: int) -> NetworkDenoiser:
    """A small network that predicts what the exact teacher does: the pretrained model every method starts from."""
    mean = tuple(float(m) for m in mixture.mean)
    network = VectorNetwork(VectorConfig(mixture.dim, mixture.n_classes or 0, mean, mixture.std))
    denoiser = make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))
    network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, WARM_STEPS)
    generator, data = torch.Generator().manual_seed(seed), MixtureSet(mixture, seed + 1)
    for step in range(WARM_STEPS):
        batch = data.batch(range(step * 512, (step + 1) * 512))
        condition = Condition.none() if batch.labels is None else Condition.of_labels(batch.labels)
        t = torch.rand(512, generator=generator)
        x_t = Flow().add_noise(batch.images, torch.randn(batch.images.shape, generator=generator), t)
        loss = (denoiser(x_t, t, condition).velocity - teacher(x_t, t, condition).velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return denoiser


@torch.no_grad()
def draw(state: TrainState, mixture: GaussianMixture, teacher: Denoiser, steps: int, seed: int) -> Samples:
    """Student, teacher and exact samples; student and teacher start from the same noise."""
    generator = torch.Generator().manual_seed(seed + 1000)
    labels = None if mixture.labels is None else mixture.sample_labels(SAMPLES, generator)
    condition = Condition.none() if labels is None else Condition.of_labels(labels)
    noise = torch.randn(SAMPLES, mixture.dim, generator=generator)
    student, method = state.method.student, state.method
    with method.averages[EMA].swapped():
        sampler = method.sampler(state.config.method, student.process, steps)
        made = sample(at_scale(student), sampler, noise, condition, generator)
    taught = sample(teacher, Sampler(Flow().step_list(steps), "euler"), noise, condition)
    exact, again = (mixture.sample(SAMPLES, generator, labels) for _ in range(2))
    return Samples(made, taught, exact, again, labels)


def judge(name: str, steps: int, samples: Samples, seconds: float) -> Verdict:
    """The energies, and whether the student passes its family's bar."""
    made = (samples.student, samples.teacher, samples.exact_again)
    student, taught, floor = (energy_distance(x, samples.exact) for x in made)
    tolerance = _tolerance(registry.get(name).family, steps, taught, floor)
    dim = samples.exact.shape[1]
    return Verdict(name, steps, dim, student, taught, floor, None, student <= tolerance, tolerance, round(seconds, 2))


def _tolerance(family: str, steps: int, teacher: float, floor: float) -> float:
    """0.03 (distribution matching) or 0.06 of the teacher's energy at one step, 0.35 of it at more.

    Where the teacher itself is below 9 floors, 3 floors pass.
    """
    one_step = 0.03 if family == "distribution" else 0.06
    share = one_step if steps == 1 else 0.35
    return max(share * teacher, 3 * floor) if teacher < 9 * floor else share * teacher


def _save(path: Path, samples: Samples) -> None:
    tensors = {"student": samples.student, "teacher": samples.teacher, "exact": samples.exact}
    if samples.labels is not None:
        tensors["labels"] = samples.labels
    partial = path.with_name(f".{path.name}.partial")
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
    os.replace(partial, path)


def _report(verdict: Verdict, out: Path | None) -> None:
    for key, value in asdict(verdict).items():
        typer.echo(f"{key:<16}{value:.5f}" if isinstance(value, float) else f"{key:<16}{value}")
    if out is not None:
        write_json(out, asdict(verdict))
