"""From a config to everything training needs: one place builds, so that train, verify and export build alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType

from fewstep import registry
from fewstep.config import RunConfig, Teacher
from fewstep.data.batch import Batch
from fewstep.data.cache_fit import told_by
from fewstep.data.loader import Loader
from fewstep.data.sources import Dataset, open_dataset
from fewstep.diffusion.process import same_process
from fewstep.diffusion.solvers import Denoiser
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance import Guided
from fewstep.models.load import Shape, load_denoiser, new_denoiser, resolve
from fewstep.models.players import Average
from fewstep.rng import Rng
from fewstep.section import found
from fewstep.training.encoding import encoded_by_the_run, unlabelled
from fewstep.training.host_memory import keep_freed_memory
from fewstep.training.loop import TrainState
from fewstep.training.method import Method, Setup
from fewstep.training.networks import prepare_networks
from fewstep.training.offload import offload_to_host
from fewstep.training.optim import make_optimizers
from fewstep.training.sharding import denoisers, refuse_with_sharding, shard
from fewstep.training.starting import (
    at_one_scale,
    hears_scales,
    open_student,
    open_teacher,
    refuse_inputs,
    refuse_other_scales,
    refuse_unheard,
)

EMA = "ema"
PLAIN = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU, DistributedType.MULTI_NPU)
"""What accelerate may be asked for: processes side by side, each with its device."""


@dataclass(frozen=True)
class Sources:
    """Where a run starts.

    Attributes:
        dataset: what it learns from.
        teacher: frozen; None: it learns from the data alone.
        student: with its first weights.
        weak: the model that the teacher is guided by, where that is not the teacher itself.
    """

    dataset: Dataset
    teacher: Denoiser | None
    student: NetworkDenoiser
    weak: Denoiser | None = None


def open_sources(config: RunConfig, device: torch.device | str = "cpu") -> Sources:
    """Data, teacher and student of a run's config.

    Raises:
        UserError: something is missing or does not fit together.
    """
    dataset = open_dataset(config.data.name, size=config.data.size, seed=config.run.seed, split="train",
                           path=config.data.path, options=config.data.options)  # fmt: skip
    teacher = open_teacher(config.teacher, device)
    dataset = encoded_by_the_run(config, dataset, device)
    if teacher is not None:
        teacher = told_by(dataset, teacher, "teacher", _folder(config.teacher.path, device)).sized(dataset.shape)
    student = _first_student(config, teacher, dataset, device)
    student = told_by(dataset, student, "student", _folder(config.student.path, device)).sized(dataset.shape)
    for name, denoiser in (("teacher", teacher), ("student", student)):
        if denoiser is not None:
            _check_fit(name, denoiser, dataset)
    weak = _weak_teacher(config.teacher.weak, teacher, device)
    return Sources(dataset if student.null is not None else unlabelled(dataset), teacher, student, weak)


def _folder(path: str | None, device: torch.device | str) -> Path | None:
    return None if path is None else resolve(path, weights=torch.device(device).type != "meta")


def _weak_teacher(
    path: str | None, teacher: NetworkDenoiser | None, device: torch.device | str
) -> NetworkDenoiser | None:
    if path is None or teacher is None:
        return None
    weak = load_denoiser(path, device, "teacher.weak")
    refuse_inputs(weak, f"teacher.weak: {path}")
    if not same_process(weak.process, teacher.process):
        raise UserError(f"teacher.weak: the noise schedule of {path} is another than the teacher's; they must agree")
    for what, (its, ours) in {
        "classes": (_classes(weak), _classes(teacher)),
        "channels": (_channels(weak), _channels(teacher)),
    }.items():
        if its != ours:
            raise UserError(f"teacher.weak: {path} has {its or 'no'} {what}, the teacher {ours or 'none'}; "
                            "they must agree")  # fmt: skip
    return weak


def _classes(denoiser: NetworkDenoiser) -> int:
    return 0 if denoiser.null is None or denoiser.null.labels is None else int(denoiser.null.labels)


def _channels(denoiser: NetworkDenoiser) -> int | None:
    return getattr(denoiser.network, "config", {}).get("in_channels")


def _first_student(
    config: RunConfig, teacher: NetworkDenoiser | None, dataset: Dataset, device: torch.device | str
) -> NetworkDenoiser:
    if config.student.new is not None:
        channels, side = dataset.shape[0], dataset.shape[-1]
        shape = Shape(channels, side, len(dataset.classes))
        return new_denoiser(config.student.new, shape, config.run.seed).to(device)
    if config.student.path is not None:
        return open_student(config.student.path, teacher, config.teacher, device)
    if teacher is None:
        raise UserError("teacher.path: missing; give a teacher, or student.new for a network from scratch")
    if config.student.lora is None:
        return at_one_scale(teacher.copy(), config.teacher)
    teacher.adapters.convolutions = config.student.lora_convolutions
    with _seeded(config.run.seed):
        return at_one_scale(teacher.lora_view("student", config.student.lora), config.teacher)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, torch's global stream starts at `seed`: new weights are the same in every process and every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _check_fit(name: str, denoiser: NetworkDenoiser, dataset: Dataset) -> None:
    channels = _channels(denoiser)
    held = dataset.shape[-1 if denoiser.family.packed else 1 if denoiser.family.frames == 1 else 0]
    if channels is not None and channels != held:
        raise UserError(f"data.name: samples have {held} channels, the {name} takes {channels}")
    if denoiser.null is None or denoiser.null.labels is None:
        return
    classes = int(denoiser.null.labels)
    if len(dataset.classes) != classes:
        raise UserError(
            f"data.name: {len(dataset.classes)} classes in the data, {classes} in the {name}; they must agree"
        )


def build_method(config: RunConfig, sources: Sources) -> Method:
    """The run's method around its sources, with the averaged student that is sampled and exported."""
    cls = registry.get(config.method.name)
    if cls.needs_teacher and sources.teacher is None:
        raise UserError(f"teacher.path: missing; {config.method.name} distils a teacher")
    guided = guided_teacher(config.teacher, sources)
    sampler = cls.sampler(config.method, sources.student.process, config.student.steps)
    refuse_unheard(sources.student, sampler, config.method.name)
    setup = Setup(sources.student, sources.teacher, guided, config.student.steps, config.train.steps,
                  _example(sources))  # fmt: skip
    method = cls(config.method, setup)
    _refuse_idle_guidance(config.teacher, method)
    refuse_other_scales(method.student, guided.hears if guided else None)
    method.critics = replace(method.critics, teacher=guided)
    method.averages = {**method.averages, EMA: Average.of(method.players["student"], config.train.ema)}
    return method


def guided_teacher(config: Teacher, sources: Sources) -> Guided | None:
    """The run's teacher under its guidance; None where there is no teacher.

    Raises:
        UserError: the teacher cannot be guided so.
    """
    if sources.teacher is None:
        return None
    null = getattr(sources.teacher, "null", None)
    negative = None if config.negative is None else _negative(config.negative, null)
    return Guided(sources.teacher, null, config.guidance, config.guidance_interval, sources.weak,
                  config.weak_condition, negative, hears_scales(sources.teacher))  # fmt: skip


def _negative(label: int, null: Condition | None) -> Condition:
    if null is None or null.labels is None:
        raise UserError(f"teacher.negative: {label} given, but the teacher has no classes")
    if label >= int(null.labels):
        raise UserError(f"teacher.negative: {label} given; the teacher's classes are 0 to {int(null.labels) - 1}")
    return Condition.of_labels(torch.full_like(null.labels, label))


def _refuse_idle_guidance(config: Teacher, method: Method) -> None:
    """What says how to guide does nothing at scale 1, unless the student takes scales of its own."""
    if config.guidance != 1.0 or method.student.guidance_range is not None:
        return
    for name in ("guidance_interval", "negative", "weak"):
        if (value := getattr(config, name)) is not None:
            raise UserError(f"teacher.{name}: {found(value)} given; teacher.guidance=1 is off, so it does nothing")


def _example(sources: Sources) -> Batch:
    device = next(sources.student.network.parameters()).device
    return next(iter(Loader(sources.dataset, 1, seed=0, rank=0, world=1))).to(device)


def make_accelerator(config: RunConfig) -> Accelerator:
    """Device, precision and processes, as `accelerate launch` or a plain start gives them."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    precision = "no" if config.train.precision == "fp32" else "bf16"
    accelerator = Accelerator(mixed_precision=precision)
    if accelerator.distributed_type not in (DistributedType.NO, *PLAIN):
        raise UserError(f"accelerate: distributed_type {accelerator.distributed_type.value} given; give MULTI_GPU, and "
                        "train.shard=full to spread networks over the processes")  # fmt: skip
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def assemble(config: RunConfig, sources: Sources, accelerator: Accelerator) -> TrainState:
    """The state at step 0.

    Raises:
        UserError: the batch does not divide over processes and micro-batches, the method refuses its config, or two
            settings do not go together.
    """
    world, accumulate = accelerator.num_processes, config.train.accumulate
    micro, rest = divmod(config.data.batch_size, world * accumulate)
    if rest or not micro:
        raise UserError(f"data.batch_size: {config.data.batch_size} does not divide into {world} processes × "
                        f"train.accumulate={accumulate}; give a multiple of {world * accumulate}")  # fmt: skip
    with _seeded(config.run.seed):
        method = build_method(config, sources)
    # After the method is built: a compiled network would not see the taps that it adds.
    held = list(denoisers((sources.teacher, sources.weak, *vars(method).values())))
    prepare_networks(config, method.players, held, accelerator.device, method.averages.values())
    refuse_with_sharding(config)
    if config.train.shard == "full" and world > 1:
        shard(method, held, accelerator.device, world)
    rank = accelerator.process_index
    loader = Loader(sources.dataset, micro, seed=config.run.seed, rank=rank, world=world, workers=config.data.workers)
    rng = Rng(config.run.seed, accelerator.device, rank, world)
    optimizers = make_optimizers(method.players, config.optim, rng)
    state = TrainState(config, method, optimizers, loader, rng, accelerator)
    if config.memory.offload:
        networks = [one.network for one in held]
        state.offload = offload_to_host(method, optimizers, networks, accelerator.device)
    return state
