"""A student's weights as a network for a file: without adapters, in diffusers' class or in one here that adds to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.solvers import Sampler, span
from fewstep.models.conditioning import SPAN
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import scheduler_time
from fewstep.models.graft import Graft, GraftedEmbedding, ScalarEmbedding
from fewstep.models.guidance_input import GUIDANCE, middle
from fewstep.models.lora import BASE, Adapters, without_adapters
from fewstep.models.stored_injection import injection_facts, injection_of
from fewstep.models.stored_inputs import FACTS, moved_names, renamed

from .networks import class_of
from .plan import Form


@torch.no_grad()
def plain_network(student: NetworkDenoiser) -> nn.Module:
    """A float32 copy of the student's network on the CPU, its adapter added to the weights and no other kept.

    Inputs of other views on the network, such as a fake score's, go; those of the student stay.
    """
    network = without_adapters(student.network, student.adapter).float().cpu()
    for path, module in [(p, m) for p, m in network.named_modules() if isinstance(m, GraftedEmbedding)]:
        for name in set(module.second) - set(student.graft.names):
            del module.second[name]
        if not len(module.second):
            network.set_submodule(path, module.base)
    network.requires_grad_(False)
    # Files hold tensors row by row, whatever order the convolutions were trained in.
    return network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]


def exported_network(student: NetworkDenoiser, sampler: Sampler) -> Any:
    """The network to save: of diffusers' class, or of the one in `networks` that has the student's added inputs."""
    network: Any = plain_network(student)
    if not student.graft.names:
        return network
    facts = _facts(student, sampler, network)
    made = class_of(type(network).__name__).from_config({**network.config, FACTS: facts})
    moved = {inside: in_file for in_file, inside in moved_names(made, student.family, facts).items()}
    made.load_state_dict({renamed(key, moved): value for key, value in network.state_dict().items()})
    return made.eval().requires_grad_(False)


def _facts(student: NetworkDenoiser, sampler: Sampler, network: nn.Module) -> dict[str, Any]:
    """What the config says of the added inputs."""
    facts: dict[str, Any] = {}
    if student.guidance_range is not None and GUIDANCE in student.graft.names:  # a class's own is told it
        scale = middle(student.guidance_range)
        facts |= {"guidance_range": list(student.guidance_range), "guidance_scale": scale}
    injection = injection_of(network)
    if injection is not None:
        facts["injection"] = injection_facts(injection)
    embeddings = {
        name: one for m in network.modules() if isinstance(m, GraftedEmbedding) for name, one in m.second.items()
    }
    facts["inputs"] = {name: _unit(embeddings[name]) for name in student.graft.names if name in embeddings}
    if SPAN in student.graft.names:
        t = torch.tensor(sampler.times, dtype=torch.float32)
        facts |= {"times": _heard(student, t).tolist(), "spans": _spans(student, t).tolist()}
    return facts


def _unit(embedding: nn.Module) -> float:
    assert isinstance(embedding, ScalarEmbedding)
    return embedding.unit


def _heard(student: NetworkDenoiser, t: Tensor) -> Tensor:
    """What the network is told at times `(n,)` of the process."""
    x = t.new_zeros(len(t), 1, 1, 1)
    return student.family.inputs(student.network, x, scheduler_time(student.process, t))[student.family.time]


def _spans(student: NetworkDenoiser, t: Tensor) -> Tensor:
    """What the sampler tells of the jump from each of the times `(n,)` to the next, the last one to clean data."""
    to = [*t[1:], None]
    return torch.cat([span(student.process, t[i : i + 1], None if s is None else s[None]) for i, s in enumerate(to)])


def store_weights_as(network: nn.Module, dtype: torch.dtype) -> None:
    """Give the network's parameters another dtype, in place, for a file."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def as_stored(student: NetworkDenoiser, form: Form) -> NetworkDenoiser:
    """The student with weights as the files will hold them, though in float32: itself, where they are float32 there.

    Adapters that leave in the network's weights are merged before these are rounded.
    """
    if form.dtype == torch.float32:
        return student
    if student.adapters.names and not form.lora:
        network = without_adapters(student.network, student.adapter)
        grafted = [m.scalars for m in network.modules() if isinstance(m, GraftedEmbedding)]
        graft = Graft(student.graft.names, grafted[0]) if grafted else Graft()
        student = replace(student, network=network, adapters=Adapters(network), adapter=BASE, graft=graft)
    for parameter in student.parameters().values():
        parameter.data = parameter.data.to(form.dtype).to(parameter.dtype)
    return student
