"""Which stock pipeline runs a student, and how that pipeline is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser

from .schedulers import Contract
from .scm_scheduler import angle

Shape = Callable[[Mapping[str, Any]], tuple[int, ...]]
"""The shape of one sample's embedding, from the network's config."""

_TOKENS = 77
_TEXT = {"prompt": "a red fox in the snow"}
_LATENT = {"output_type": "latent"}
_SMALL = {"height": 32, "width": 32}
_AS_TOLD = {**_SMALL, "use_resolution_binning": False}


@dataclass(frozen=True)
class Recipe:
    """How one stock pipeline is called.

    Attributes:
        pipeline: its class in diffusers.
        tag: its task, by the hub's name.
        lists: the explicit lists of steps it takes.
        fixed: what it must always be told.
        example: what a reader's first call asks for.
        embeddings: the arguments that stand in for a prompt; those whose name ends in `mask` are ones.
        seeded: whether `generator` reaches the scheduler; if not, re-noising draws from torch's global generator.
        sized: whether it is told the batch size.
        raw: how it is asked for plain tensors, of a small sample where it is told the size.
        flow: whether diffusers' own flow schedulers run in it.
        scaled: whether it scales its first noise and the network's input as the scheduler says, which EDM needs.
        lora: whether it loads files of adapters.
        output: what its result calls the pictures.
        pixels: whether the VAE that it decodes with is fewstep's, which leaves pixels as they are.
    """

    pipeline: str
    tag: str
    lists: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    example: Mapping[str, Any] = field(default_factory=dict)
    embeddings: Mapping[str, Shape] = field(default_factory=dict)
    seeded: bool = True
    sized: bool = False
    raw: Mapping[str, Any] = field(default_factory=dict)
    flow: bool = True
    scaled: bool = False
    lora: bool = False
    output: str = "images"
    pixels: bool = False

    def serves(self, contract: Contract) -> bool:
        """Whether the contract's scheduler keeps its steps here: by their number, or by a list that can be passed.

        Raises:
            UserError: EDM's noise, which the pipeline would not scale.
        """
        if contract.space == "edm" and not self.scaled:
            raise UserError(f"export: {self.pipeline} does not scale its noise, as EDM's preconditioning needs it")
        told = contract.by_number or contract.argument in self.lists
        return told and (self.flow or contract.own or contract.space != "flow")

    def call(self, contract: Contract) -> dict[str, Any]:
        """The arguments that make the pipeline take the contract's steps, guidance off."""
        if contract.argument == "timesteps":
            return {"num_inference_steps": None, "timesteps": [int(t) for t in contract.values], **self.fixed}
        told: dict[str, Any] = {}
        if contract.argument == "sigmas":
            told = {"sigmas": list(contract.values)}
        elif contract.argument == "intermediate_timesteps":
            told = {"intermediate_timesteps": angle(contract.values[1])}
        return {"num_inference_steps": len(contract.values), **self.fixed, **told}


def _tokens(key: str) -> Shape:
    return lambda config: (_TOKENS, config[key])


def _vector(key: str) -> Shape:
    return lambda config: (config[key],)


def _whole_text(config: Mapping[str, Any]) -> tuple[int, ...]:
    return config["max_text_seq_length"], config["text_embed_dim"]


def _mask(config: Mapping[str, Any]) -> tuple[int, ...]:
    return (_TOKENS,)


def _sdxl_pooled(config: Mapping[str, Any]) -> tuple[int, ...]:
    """What is left of the added embedding beside six sizes."""
    return (config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"],)


def _prompted(pipeline: str, embeddings: Mapping[str, Shape], *lists: str, **facts: Any) -> Recipe:
    """A text-to-image pipeline whose guidance is off at scale 1, with a loader of adapters."""
    usual: dict[str, Any] = {"fixed": {"guidance_scale": 1.0}, "example": _TEXT, "lora": True}
    raw = {**_LATENT, **facts.pop("told", _SMALL)}
    return Recipe(pipeline, facts.pop("tag", "text-to-image"), lists, embeddings=embeddings, raw=raw,
                  **{**usual, **facts})  # fmt: skip


_CLASSES = "unconditional-image-generation"
_PIXELS = {"output_type": "pt"}
_CAPTIONS = {"prompt_embeds": _tokens("caption_channels"), "prompt_attention_mask": _mask}
_JOINT = {"prompt_embeds": _tokens("joint_attention_dim"), "pooled_prompt_embeds": _vector("pooled_projection_dim")}
_CROSS = {"prompt_embeds": _tokens("cross_attention_dim")}

RECIPES = {
    recipe.pipeline: recipe
    for recipe in (
        Recipe("ConsistencyModelPipeline", _CLASSES, ("timesteps",), sized=True, raw=_PIXELS, flow=False, scaled=True),
        Recipe("DDPMPipeline", _CLASSES, sized=True, raw=_PIXELS),
        Recipe("DiTPipeline", _CLASSES, fixed={"guidance_scale": 1.0}, seeded=False, raw=_PIXELS),
        _prompted("StableDiffusionPipeline", _CROSS, "timesteps", scaled=True),
        _prompted(
            "StableDiffusionXLPipeline", {**_CROSS, "pooled_prompt_embeds": _sdxl_pooled}, "timesteps", scaled=True
        ),
        *(
            _prompted(name, _CAPTIONS, "timesteps", told=_AS_TOLD, lora=False, scaled=True)
            for name in ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
        ),
        _prompted("StableDiffusion3Pipeline", _JOINT, "sigmas", seeded=False),
        # Its scale goes to the network, where that takes one; it never guides by two evaluations unless asked to.
        _prompted("FluxPipeline", _JOINT, "sigmas", seeded=False, fixed={}),
        _prompted("Flux2Pipeline", {"prompt_embeds": _tokens("joint_attention_dim")}, "sigmas", seeded=False, fixed={}),
        _prompted("Flux2KleinPipeline", {"prompt_embeds": _tokens("joint_attention_dim")}, "sigmas", seeded=False),
        _prompted("SanaPipeline", _CAPTIONS, "timesteps", "sigmas", told=_AS_TOLD),
        _prompted(
            "SanaSprintPipeline",
            _CAPTIONS,
            "intermediate_timesteps",
            told=_AS_TOLD,
            fixed={"max_timesteps": math.pi / 2, "intermediate_timesteps": None},
        ),
        _prompted(
            "Lumina2Pipeline",
            {"prompt_embeds": _tokens("cap_feat_dim"), "prompt_attention_mask": _mask},
            "sigmas",
            seeded=False,
        ),
        _prompted(
            "ZImagePipeline",
            {"prompt_embeds": _tokens("cap_feat_dim")},
            "sigmas",
            seeded=False,
            fixed={"guidance_scale": 0.0},
        ),
        _prompted(
            "WanPipeline",
            {"prompt_embeds": _tokens("text_dim")},
            seeded=False,
            tag="text-to-video",
            told={**_SMALL, "num_frames": 5},
            output="frames",
        ),
        _prompted(
            "QwenImagePipeline",
            {"prompt_embeds": _tokens("joint_attention_dim"), "prompt_embeds_mask": _mask},
            "sigmas",
            seeded=False,
            fixed={"true_cfg_scale": 1.0},
        ),
        _prompted(
            "CogVideoXPipeline",
            {"prompt_embeds": _whole_text},
            "timesteps",
            tag="text-to-video",
            told={**_SMALL, "num_frames": 5},
            output="frames",
        ),
    )
}


def _makes_pixels(student: NetworkDenoiser) -> bool:
    """Whether it is a transformer of classes alone whose samples are pictures."""
    network: Any = student.network
    return type(network).__name__ == "DiTTransformer2DModel" and network.config["in_channels"] in (1, 3)


def recipe_of(student: NetworkDenoiser, teacher_pipeline: str | None) -> Recipe:
    """The pipeline that runs the student: diffusers' own for networks of pixels, the teacher's for all others.

    Raises:
        UserError: there is no such pipeline, or fewstep does not know how it is called.
    """
    if type(student.network).__name__ == "UNet2DModel":
        plain = isinstance(student.process, Flow) and student.null is None
        return RECIPES["DDPMPipeline" if plain else "ConsistencyModelPipeline"]
    if teacher_pipeline is None and _makes_pixels(student):
        return replace(RECIPES["DiTPipeline"], pixels=True)
    if teacher_pipeline is None:
        raise UserError(
            f"export: {type(student.network).__name__} leaves in its teacher's pipeline, and no teacher is given"
        )
    if teacher_pipeline not in RECIPES:
        raise UserError(f"export: {teacher_pipeline} is not known; {', '.join(RECIPES)} are")
    return RECIPES[teacher_pipeline]
