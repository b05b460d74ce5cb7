"""Networks with inputs that diffusers' own classes lack, as its pipelines load and call them.

`FewStepUNet2DModel` and its like are the class of that name with something added: the span of a jump (two-time
students), or a guidance scale. A pipeline tells a network nothing but its time. So the config says which span belongs
to which time, and which scale is taken where nobody sets `guidance_scale`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin as ModelMixin  # diffusers looks for it here, to know how the classes are loaded
from torch import Tensor, nn

from fewstep.models.conditioning import SPAN
from fewstep.models.families import FAMILIES, Family, family_of
from fewstep.models.graft import Graft, added_embedding
from fewstep.models.guidance_input import GUIDANCE
from fewstep.models.stored_injection import add_injection
from fewstep.models.stored_inputs import FACTS, INPUTS, PREFIX, places

_NEAR = 5e-3  # what half precision does to a time; the steps of a student lie further apart


class AddedInputs(ModelMixin):
    """What is added to a diffusers network's class, which comes second among the parents.

    Attributes:
        family: of that class.
        facts: the config's `fewstep`.
        graft: the names of the inputs, and where their values are told.
    """

    family: Family
    facts: Mapping[str, Any]
    graft: Graft

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The network with its inputs; their weights come later."""
        made: Any = super()
        plain = {key: value for key, value in config.items() if key != FACTS}
        network, rest = made.from_config(plain, return_unused_kwargs=True, **kwargs)
        _add_inputs(network, config[FACTS])
        return (network, rest) if return_unused_kwargs else network

    @property
    def guidance_scale(self) -> float | None:
        """The scale that samples are made with; None where the network takes none."""
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        if self._guidance_scale is None:
            raise ValueError("guidance_scale: this network takes none")
        low, high = self.facts["guidance_range"]
        if not low <= scale <= high:
            raise ValueError(f"guidance_scale: {scale:g} given; this network was trained for {low:g} to {high:g}")
        self._guidance_scale = float(scale)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own call, with the added inputs told."""
        told = inspect.signature(self.forward).bind(*args, **kwargs).arguments
        device = next(self.parameters()).device
        time = torch.as_tensor(told[self.family.time], device=device).expand(len(told[self.family.sample]))
        with self.graft.hearing(self._values(time)):
            return super().__call__(**{**told, self.family.time: time})

    def _values(self, time: Tensor) -> dict[str, Tensor]:
        values = {} if "spans" not in self.facts else {SPAN: self._span(time.float())}
        if self._guidance_scale is not None:
            values[GUIDANCE] = torch.full((len(time),), self._guidance_scale, device=time.device)
        return values

    def _span(self, time: Tensor) -> Tensor:
        """The spans `(B,)` of the jumps that start at `time` `(B,)`.

        Raises:
            ValueError: no jump starts there.
        """
        times, spans = (torch.tensor(self.facts[key], device=time.device) for key in ("times", "spans"))
        gaps, steps = (time[:, None] - times).abs(), [round(t, 4) for t in self.facts["times"]]
        if bool((gaps.amin(1) > _NEAR * (1 + times.abs().max())).any()):
            raise ValueError(f"time {time[0].item():g} told; this network's jumps start at {steps}")
        return spans[gaps.argmin(1)]


def _add_inputs(network: Any, facts: Mapping[str, Any]) -> None:
    """Add what `facts` say to a network of one of the classes here, in place, and keep them in its config."""
    network.register_to_config(**{FACTS: dict(facts)})
    network.facts, network._guidance_scale = facts, facts.get("guidance_scale")
    inside = add_injection(network, network.family, facts["injection"]) if "injection" in facts else Graft()
    inputs = facts.get("inputs", {})
    network.graft = replace(inside, names=(*inside.names, *inputs))
    added = nn.ModuleDict()
    for name, unit in inputs.items():
        embeddings = nn.ModuleList()
        for path in places(network, network.family):
            embedding = added_embedding(network.get_submodule(path), unit)
            network.get_submodule(path).register_forward_hook(partial(_sum, network.graft, name, embedding))
            embeddings.append(embedding)
        added[name] = embeddings
    if inputs:
        network.add_module(INPUTS, added)


def _sum(graft: Graft, name: str, embedding: nn.Module, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    # Where the network's weights visit a device, they are not there yet when its inputs are told.
    return output + embedding(graft.scalars.values[name].to(output.device)).to(output.dtype)


def class_of(name: str) -> Any:
    """The class here that adds to diffusers' class `name`; always the same one.

    Raises:
        UserError: fewstep does not know that class.
    """
    if PREFIX + name not in globals():
        words = {"__module__": __name__, "__doc__": f"{name} with inputs added by fewstep.", "family": family_of(name)}
        globals()[PREFIX + name] = type(PREFIX + name, (AddedInputs, getattr(diffusers, name)), words)
    return globals()[PREFIX + name]


def __getattr__(name: str) -> Any:
    """The classes are made when they are asked for: importing all of diffusers' networks would take seconds."""
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in FAMILIES:
        return class_of(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
