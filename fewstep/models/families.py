"""The few facts that differ by architecture. Adding one = one entry here, proved by the contract test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow
from fewstep.errors import UserError, did_you_mean
from fewstep.models.native_guidance import add_to_flux, add_to_unet


def scheduler_time(process: Process, t: Tensor) -> Tensor:
    """The timestep that a diffusers scheduler of this process would hand to the pipeline's network.

    VP: the table index; flow: 1000·t; EDM: ¼·ln σ; TrigFlow: t.
    """
    match process:
        case VP() | TrigFlow():
            return t
        case Flow():
            return process.timesteps * t
        case EDM():
            return 0.25 * torch.log(t)
    raise TypeError(f"no timestep is defined for {type(process).__name__}")


@dataclass(frozen=True)
class GuidanceInput:
    """The input that a class has for a guidance scale, in networks that were made with it.

    Attributes:
        argument: that takes it.
        config: the key of the network's config that is neither None nor false where the input is there; a number is
            how many sines and cosines of the scale are passed in its place.
        scale: the key of the network's config that the scale is multiplied with.
        add: gives the input to a network that was made without it, in place and silent at first; it says what the names
            of the new parameters have in them. None where the usual pipelines of such networks would not feed it.
    """

    argument: str
    config: str
    scale: str | None = None
    add: Callable[[nn.Module], str] | None = None


@dataclass(frozen=True)
class TextMask:
    """Text as long as the longest prompt of a call, with a mask that the pipeline leaves out where none is shorter.

    Attributes:
        text: the argument that takes the text `(B, L, D)`.
        mask: the argument that takes the mask `(B, L)`.
    """

    text: str
    mask: str


def _unchanged(timestep: Tensor) -> Tensor:
    return timestep


def _thousandth(timestep: Tensor) -> Tensor:
    return timestep / 1000


def _from_noise(timestep: Tensor) -> Tensor:
    """1 at clean data, 0 at pure noise."""
    return 1 - timestep / 1000


def _from_noise_whole(timestep: Tensor) -> Tensor:
    """The same, rounded as Z-Image's pipeline rounds it."""
    return (1000 - timestep) / 1000


@dataclass(frozen=True)
class Family:
    """How one network class is called. x crosses as the pipeline hands it to its scheduler's `step`.

    Attributes:
        component: the pipeline's folder of the network.
        sample: the argument that takes x_t.
        tap: the module whose output is the bottleneck, for discriminators.
        null_label: the label index of the null class, from the network's config, or None without classes.
        learned_sigma: the output may carry as many channels again for a learned variance; they are split off.
        time_embedding: the last part of the names of the modules that embed the time; a scalar input is added there.
        compute_blocks: names of the module lists worth compiling or checkpointing block by block.
        time: the argument that takes the time.
        heard: what the network is told of the scheduler's timestep.
        time_scale: the key of the network's config that the timestep is multiplied with besides.
        negative: the output is minus what the scheduler calls the prediction.
        listed: samples go in and come out as a list of `(C, 1, H, W)`.
        packed: x is tokens `(B, N, 4C)`, each of 2×2 latent pixels.
        frames: x has an axis of frames: the place of that axis in `(B, *)`.
        tap_element: which element of a block's output is the image, where it returns several.
        one_stream: the blocks' tokens are text and image together.
        guidance: the class's own input for a guidance scale.
        unserved: a key of the network's config that the class takes and cannot serve: it has no layers for it.
        text_mask: what tells how long a prompt is, where its pipeline does not always tell it.
        first_layer: the module whose output has the precision that the network gives its time, by mistake.
        unguided: the `guidance_scale` at which the pipeline does not guide.
        empirical_shift: a dynamic shift follows FLUX.2's fit, of size and step count, and not the scheduler's line.
    """

    component: str
    sample: str
    tap: Callable[[nn.Module], str]
    null_label: Callable[[dict[str, object]], int | None] = lambda config: None
    learned_sigma: bool = False
    time_embedding: str = ""
    compute_blocks: tuple[str, ...] = ()
    time: str = "timestep"
    heard: Callable[[Tensor], Tensor] = _unchanged
    time_scale: str | None = None
    negative: bool = False
    listed: bool = False
    packed: bool = False
    frames: int | None = None
    tap_element: int = -1
    one_stream: bool = False
    guidance: GuidanceInput | None = None
    unserved: str | None = None
    text_mask: TextMask | None = None
    first_layer: str | None = None
    unguided: float = 1.0
    empirical_shift: bool = False

    def inputs(self, network: nn.Module, x: Tensor, timestep: Tensor) -> dict[str, Any]:
        """The arguments for a sample `x` `(B, *)` at the scheduler's timesteps `(B,)`."""
        heard = self.heard(timestep)
        if self.time_scale is not None:
            heard = heard * cast(Any, network).config[self.time_scale]
        return {self.sample: list(x.unsqueeze(2)) if self.listed else x, self.time: heard}

    def prediction(self, output: Any, x: Tensor) -> Tensor:
        """What the pipeline makes of the network's first output for its scheduler, of `x`'s shape `(B, *)`."""
        value = torch.stack(list(output)).squeeze(2) if self.listed else output
        if self.learned_sigma:
            value = value[:, : x.shape[1]]
        return -value if self.negative else value

    def tokens(self, shape: Sequence[int]) -> int:
        """How many tokens a sample of that shape is to a dynamic shift."""
        if self.packed:
            return shape[0]
        return (shape[-2] // 2) * (shape[-1] // 2)

    def check(self, network: nn.Module) -> None:
        """Whether the network's class can do what its config says.

        Raises:
            UserError: it cannot, and would fail at its first call.
        """
        config: Mapping[str, Any] = getattr(network, "config", {})
        if self.unserved is not None and config.get(self.unserved):
            raise UserError(
                f"{type(network).__name__}: its config says {self.unserved}: true, for which diffusers' class has no "
                "layers; networks with false are known"
            )

    def own_guidance(self, config: Mapping[str, Any]) -> GuidanceInput | None:
        """The input for a guidance scale of a network with that config, or None where it was made without."""
        there = self.guidance is not None and config.get(self.guidance.config) not in (None, False)
        return self.guidance if there else None


def _mid_block(network: nn.Module) -> str:
    return "mid_block"


def _middle_of(name: str) -> Callable[[nn.Module], str]:
    """The block in the middle of the module list `name`."""

    def middle(network: nn.Module) -> str:
        blocks = network.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        return f"{name}.{len(blocks) // 2}"

    return middle


def _last_label(config: dict[str, object]) -> int | None:
    """Class-conditional UNets of fewstep keep the last embedding for the null class."""
    count = config.get("num_class_embeds")
    return count - 1 if isinstance(count, int) else None


def _dit_null(config: dict[str, object]) -> int | None:
    """DiT appends the null class after its `num_embeds_ada_norm` classes."""
    count = config.get("num_embeds_ada_norm")
    return count if isinstance(count, int) else None


_UNET_BLOCKS = ("down_blocks", "up_blocks")
_GUIDANCE = GuidanceInput("guidance", "guidance_embeds")


def _transformer(blocks: str = "transformer_blocks", *others: str, **facts: Any) -> Family:
    """A transformer tapped in the middle of its list `blocks`."""
    usual = {"sample": "hidden_states", "time_embedding": "timestep_embedder"}
    return Family("transformer", tap=_middle_of(blocks), compute_blocks=(blocks, *others), **{**usual, **facts})


FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(
        "unet", "sample", _mid_block, _last_label, time_embedding="time_embedding", compute_blocks=_UNET_BLOCKS
    ),
    "UNet2DConditionModel": Family(
        "unet",
        "sample",
        _mid_block,
        time_embedding="time_embedding",
        compute_blocks=_UNET_BLOCKS,
        guidance=GuidanceInput("timestep_cond", "time_cond_proj_dim", add=add_to_unet),
    ),
    "DiTTransformer2DModel": _transformer(null_label=_dit_null, learned_sigma=True),
    "PixArtTransformer2DModel": _transformer(learned_sigma=True),
    "SD3Transformer2DModel": _transformer(),
    "FluxTransformer2DModel": _transformer(
        "transformer_blocks",
        "single_transformer_blocks",
        heard=_thousandth,
        packed=True,
        first_layer="x_embedder",
        guidance=GuidanceInput("guidance", "guidance_embeds", add=add_to_flux),
    ),
    "Flux2Transformer2DModel": _transformer(
        "transformer_blocks",
        "single_transformer_blocks",
        heard=_thousandth,
        packed=True,
        guidance=_GUIDANCE,
        empirical_shift=True,
    ),
    "SanaTransformer2DModel": _transformer(
        learned_sigma=True,
        time_scale="timestep_scale",
        guidance=GuidanceInput("guidance", "guidance_embeds", scale="guidance_embeds_scale"),
    ),
    "WanTransformer3DModel": _transformer("blocks", time_embedding="time_embedder", frames=2),
    "Lumina2Transformer2DModel": _transformer("layers", heard=_from_noise, negative=True, one_stream=True),
    "ZImageTransformer2DModel": _transformer(
        "layers",
        sample="x",
        time="t",
        heard=_from_noise_whole,
        negative=True,
        listed=True,
        time_embedding="t_embedder",
        one_stream=True,
        unguided=0.0,
    ),
    "QwenImageTransformer2DModel": _transformer(
        heard=_thousandth,
        packed=True,
        first_layer="img_in",
        unserved="guidance_embeds",
        text_mask=TextMask("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
    "CogVideoXTransformer3DModel": _transformer(time_embedding="time_embedding", frames=1, tap_element=0),
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
