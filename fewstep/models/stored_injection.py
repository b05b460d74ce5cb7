"""Guidance adapters and guides as facts in a network's config: from a trained network, and back to an empty one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.models import adapter_guidance, guide_network
from fewstep.models.adapter_guidance import Adapter, GuidanceAdapters
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import Family
from fewstep.models.graft import Graft
from fewstep.models.guide_network import Guide
from fewstep.models.injection import Injection, Told
from fewstep.models.lora import Adapters


def injection_of(network: nn.Module) -> Injection | None:
    """What is added to the network's hidden states, or None."""
    return next((child for child in network.children() if isinstance(child, Injection)), None)


def injection_facts(injection: Injection) -> dict[str, Any]:
    """What `add_injection` makes an empty one of."""
    match injection:
        case GuidanceAdapters():
            layers = [_adapter(one).down for one in injection.adapters]
            own = {"kind": adapter_guidance.NAME, "sizes": [layer.in_features for layer in layers]}
            return {**own, "rank": layers[0].out_features, **_common(injection, injection.told)}
        case Guide():
            sizes = [_linear(one).out_features for one in injection.outs]
            own = {"kind": guide_network.NAME, "sizes": sizes, "factors": list(injection.factors)}
            own |= {"tokens": list(injection.tokens), "channels": _linear(injection.outs[0]).in_features}
            return {**own, "inputs": _inputs(injection.first), **_common(injection, injection.told)}
    raise TypeError(f"{type(injection).__name__} cannot be written into a config")


def add_injection(network: nn.Module, family: Family, facts: Mapping[str, Any]) -> Graft:
    """Put an empty one into the network, in place; where its scale is told."""
    told, scales = _told(facts["told"]), tuple(facts["told"]["scales"])
    blocks, sizes = tuple(facts["blocks"]), tuple(facts["sizes"])
    if facts["kind"] == guide_network.NAME:
        x, shapes = _shapes(facts)
        made: Injection = Guide(blocks, shapes, x, told, facts["channels"])
    else:
        made = GuidanceAdapters(blocks, sizes, told, facts["rank"], told.width)
    # Process and prediction say nothing here: the pipeline's scheduler has both.
    bare = NetworkDenoiser(network, family, Flow(), Kind.VELOCITY, None, Adapters(network))
    return made.install(bare, facts["kind"], scales).graft


def _common(injection: Injection, told: Told) -> dict[str, Any]:
    text = {key: _linear(layer).in_features for key, layer in told.of_text.items()}
    classes = 0 if told.of_label is None else told.of_label.num_embeddings - 1
    hears = {"times": list(told.times), "scales": list(told.scales), "width": told.width}
    return {"blocks": list(injection.blocks), "told": {**hears, "classes": classes, "text": text}}


def _told(facts: Mapping[str, Any]) -> Told:
    example = Condition({key: torch.zeros(1, size) for key, size in facts["text"].items()})
    low, high = facts["scales"]
    told = Told(Flow(), (low, high), example, facts["classes"], facts["width"])
    first, last = facts["times"]
    told.times = first, last
    return told


def _shapes(facts: Mapping[str, Any]) -> tuple[torch.Size, tuple[torch.Size, ...]]:
    """Shapes of a sample, of any side that all factors divide, and of the blocks' outputs; `(1, C)` of vectors."""
    factors, side = facts["factors"], max(facts["factors"])
    for factor in factors:
        side = side if not factor or side % factor == 0 else side * factor
    shapes = []
    for size, factor, token in zip(facts["sizes"], factors, facts["tokens"], strict=True):
        pixels = side // factor if factor else 0
        image = (1, size, pixels, pixels) if factor else (1, size)
        shapes.append(torch.Size((1, pixels * pixels, size) if token else image))
    x = (1, facts["inputs"], side, side) if side else (1, facts["inputs"])
    return torch.Size(x), tuple(shapes)


def _adapter(module: nn.Module) -> Adapter:
    assert isinstance(module, Adapter)
    return module


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


def _inputs(first: nn.Module) -> int:
    return first.in_channels if isinstance(first, nn.Conv2d) else _linear(first).in_features
