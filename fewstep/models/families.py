"""The few facts that differ by architecture. Adding one = one entry here, proved by the contract test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow
from fewstep.errors import UserError, did_you_mean


def scheduler_time(process: Process, t: Tensor) -> Tensor:
    """The timestep that a diffusers scheduler of this process would hand to the pipeline's network.

    VP: the table index; flow: 1000·t; EDM: ¼·ln σ; TrigFlow: t.
    """
    match process:
        case VP() | TrigFlow():
            return t
        case Flow():
            return 1000.0 * t
        case EDM():
            return 0.25 * torch.log(t)
    raise TypeError(f"no timestep is defined for {type(process).__name__}")


@dataclass(frozen=True)
class Family:
    """How one network class is called.

    Attributes:
        component: the pipeline's folder of the network.
        sample: the argument that takes x_t.
        learned_sigma: the output may carry as many channels again for a learned variance; they are split off.
        null_label: the label index of the null class, from the network's config, or None without classes.
        tap: the module whose output is the bottleneck, for discriminators.
        time_embedding: the last part of the names of the modules that embed the time; a scalar input is added there.
        compute_blocks: names of the module lists worth compiling or checkpointing block by block.
    """

    component: str
    sample: str
    tap: Callable[[nn.Module], str]
    null_label: Callable[[dict[str, object]], int | None] = lambda config: None
    learned_sigma: bool = False
    time_embedding: str = ""
    compute_blocks: tuple[str, ...] = ()


def _mid_block(network: nn.Module) -> str:
    return "mid_block"


def _middle_transformer_block(network: nn.Module) -> str:
    blocks = network.get_submodule("transformer_blocks")
    assert isinstance(blocks, nn.ModuleList)
    return f"transformer_blocks.{len(blocks) // 2}"


def _last_label(config: dict[str, object]) -> int | None:
    """Class-conditional UNets of fewstep keep the last embedding for the null class."""
    count = config.get("num_class_embeds")
    return count - 1 if isinstance(count, int) else None


def _dit_null(config: dict[str, object]) -> int | None:
    """DiT appends the null class after its `num_embeds_ada_norm` classes."""
    count = config.get("num_embeds_ada_norm")
    return count if isinstance(count, int) else None


_UNET_BLOCKS = ("down_blocks", "up_blocks")

FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(
        "unet", "sample", _mid_block, _last_label, time_embedding="time_embedding", compute_blocks=_UNET_BLOCKS
    ),
    "UNet2DConditionModel": Family(
        "unet", "sample", _mid_block, time_embedding="time_embedding", compute_blocks=_UNET_BLOCKS
    ),
    "DiTTransformer2DModel": Family(
        "transformer",
        "hidden_states",
        _middle_transformer_block,
        _dit_null,
        learned_sigma=True,
        time_embedding="timestep_embedder",
        compute_blocks=("transformer_blocks",),
    ),
    "SD3Transformer2DModel": Family(
        "transformer",
        "hidden_states",
        _middle_transformer_block,
        time_embedding="timestep_embedder",
        compute_blocks=("transformer_blocks",),
    ),
    "VectorNetwork": Family("network", "sample", lambda network: "middle", _last_label, time_embedding="first"),
}


def family_of(class_name: str) -> Family:
    """The family of a network class.

    Raises:
        UserError: fewstep does not know the class.
    """
    if class_name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"network {class_name!r} is not known{did_you_mean(class_name, FAMILIES)}; known: {known}")
    return FAMILIES[class_name]
