"""Networks with added inputs in a folder: the config says under `fewstep` what was added to diffusers' own class.

In a file the embeddings of an added input stand together, under `fewstep_inputs.NAME.I` for the I-th time embedding.
In a network that trains, each stands beside its time embedding (`fewstep.models.graft`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.families import Family, family_of
from fewstep.models.graft import Graft
from fewstep.models.stored_injection import add_injection

PREFIX = "FewStep"
"""How the names of classes with added inputs begin; what follows is diffusers' own."""
FACTS = "fewstep"
"""The key of a config with what is added."""
INPUTS = "fewstep_inputs"
"""The sub-module with the embeddings of added inputs, in a file."""


@dataclass(frozen=True)
class Stored:
    """A network as it was before it was exported.

    Attributes:
        network: of diffusers' own class, with the inputs added.
        graft: these.
        guidance_range: the guidance scales that it takes as one of them; None: it takes none.
    """

    network: nn.Module
    graft: Graft
    guidance_range: tuple[float, float] | None


def plain_name(class_name: str) -> str:
    """Of a class with added inputs, diffusers' own that it adds to; every other name as it is."""
    return class_name.removeprefix(PREFIX)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the network without what was added to it."""
    rest = {key: value for key, value in config.items() if key != FACTS}
    return {**rest, "_class_name": plain_name(config.get("_class_name", ""))}


def places(network: nn.Module, family: Family) -> list[str]:
    """The modules whose output added inputs go to, in the order of their numbers in files."""
    return [path for path, _ in network.named_modules() if path.rpartition(".")[2] == family.time_embedding]


def moved_names(network: nn.Module, family: Family, facts: Mapping[str, Any]) -> dict[str, str]:
    """How the names of added embeddings begin in a file, and how in the network."""
    return {f"{INPUTS}.{name}.{i}.": f"{path}.second.{name}."
            for i, path in enumerate(places(network, family)) for name in facts.get("inputs", ())}  # fmt: skip


def renamed(key: str, moved: Mapping[str, str]) -> str:
    """The name with its beginning moved, if it is one of those."""
    return next((new + key.removeprefix(old) for old, new in moved.items() if key.startswith(old)), key)


def load_stored(folder: Path, config: Mapping[str, Any], device: torch.device) -> Stored:
    """The network of a component's folder whose config says that inputs were added; on the meta device its shapes.

    Raises:
        UserError: the class is not known, or the weights cannot be read or are not its.
    """
    import diffusers

    plain, facts = plain_config(config), config[FACTS]
    family = family_of(plain["_class_name"])
    try:
        with _hollow():
            network = getattr(diffusers, plain["_class_name"]).from_config(plain)
            moved = moved_names(network, family, facts)
            graft, ends = _added(network, family, facts), facts.get("guidance_range")
            ranged = None if ends is None else (float(ends[0]), float(ends[1]))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'}: what it says of added inputs is damaged; export again") from error
    if device.type != "meta":
        _fill(network, folder, moved)
    return Stored(network.eval(), graft, ranged)


def _hollow() -> Any:
    """Inside, new parameters have no values; buffers do, of which a file need not hold all."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def _added(network: nn.Module, family: Family, facts: Mapping[str, Any]) -> Graft:
    """Add to the network, in place, what `facts` say; where its inputs are told."""
    graft = add_injection(network, family, facts["injection"]) if "injection" in facts else Graft()
    for name, unit in facts.get("inputs", {}).items():
        graft = graft.grown(network, family.time_embedding, name, unit)
    return graft


def _fill(network: nn.Module, folder: Path, moved: Mapping[str, str]) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors = {renamed(key, moved): value.float() for key, value in load_file(file).items()}
            unknown = network.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
        except (SafetensorError, OSError, RuntimeError) as error:
            told = str(error).strip().splitlines()[0]
            raise UserError(f"{file}: the weights cannot be read: {told}") from error
        if unknown:
            raise UserError(f"{file}: the weights cannot be read: {unknown[0]} is not of this network")
    missing = [key for key, value in network.state_dict().items() if value.is_meta]
    if missing:
        raise UserError(f"{folder}: the weights cannot be read: {missing[0]} is missing")


@torch.no_grad()
def add_adapters(network: nn.Module, file: Path, component: str) -> None:
    """Add to the network's weights, in place, what a file of adapters for `component` of a pipeline holds.

    Raises:
        UserError: it cannot be read, or is of another network.
    """
    try:
        tensors = load_file(file)
        for path, change in _changes(tensors, f"{component}."):
            weight = network.get_submodule(path).get_parameter("weight")
            weight += change.view_as(weight)
    except (SafetensorError, OSError, AttributeError, KeyError, RuntimeError) as error:
        raise UserError(f"{file}: no adapters of {type(network).__name__}: {str(error).splitlines()[0]}") from error


def _changes(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Layers, and B·A of each, whose scale is 1."""
    for key in tensors:
        path, ending, _ = key.removeprefix(prefix).rpartition(".lora_A.weight")
        if ending:
            down, up = tensors[key].float(), tensors[key.replace(".lora_A.", ".lora_B.")].float()
            yield path, up.flatten(1) @ down.flatten(1)
