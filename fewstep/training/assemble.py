"""From a config to everything training needs: one place builds, so that train, verify and export build alike."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator, DistributedType

from fewstep import registry
from fewstep.config import RunConfig, Teacher
from fewstep.data.batch import Batch
from fewstep.data.loader import Loader
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.guidance import Guided
from fewstep.models.players import Average
from fewstep.rng import Rng, seeded
from fewstep.section import found
from fewstep.training.host_memory import keep_freed_memory
from fewstep.training.loop import TrainState
from fewstep.training.method import Method, Setup
from fewstep.training.networks import prepare_networks
from fewstep.training.offload import offload_to_host
from fewstep.training.opening import Sources
from fewstep.training.optim import make_optimizers
from fewstep.training.sharding import denoisers, refuse_with_sharding, shard
from fewstep.training.starting import (
    hears_scales,
    refuse_other_scales,
    refuse_unheard,
)

EMA = "ema"
PLAIN = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU, DistributedType.MULTI_NPU)
"""What accelerate may be asked for: processes side by side, each with its device."""


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
    with seeded(config.run.seed):
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
