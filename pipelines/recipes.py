"""Which stock pipeline runs a student, and how that pipeline is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser

from .schedulers import Contract

_TEXT = {"prompt": "a red fox in the snow"}
_NO_GUIDANCE = {"guidance_scale": 1.0}


@dataclass(frozen=True)
class Recipe:
    """How one stock pipeline is called.

    Attributes:
        pipeline: its class in diffusers.
        tag: its task, by the hub's name.
        lists: the explicit lists of steps it takes.
        fixed: what it must always be told.
        example: what a reader's first call asks for.
        embeddings: the arguments that stand in for a prompt where the text encoders are missing.
        latents: whether the starting noise can be handed in; if not, it is the first draw from `generator`.
        seeded: whether `generator` reaches the scheduler; if not, re-noising draws from torch's global generator.
        sized: whether it is told the batch size.
        raw: how it is asked for plain tensors.
    """

    pipeline: str
    tag: str
    lists: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    example: Mapping[str, Any] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    latents: bool = True
    seeded: bool = True
    sized: bool = False
    raw: Mapping[str, Any] = field(default_factory=dict)

    def call(self, contract: Contract) -> dict[str, Any]:
        """The arguments that make the pipeline take the contract's steps, guidance off.

        Raises:
            UserError: the steps are not the scheduler's own and the pipeline takes no list of them.
        """
        steps = len(contract.values)
        if contract.by_number:
            return {"num_inference_steps": steps, **self.fixed}
        if contract.argument not in self.lists:
            name = type(contract.scheduler).__name__
            raise UserError(
                f"export: {self.pipeline} takes no {contract.argument}, and the own grid of {name} in {steps} steps is "
                f"not the student's {list(contract.values)}; 1, 2, 4, 5 or 8 steps on an unshifted grid can leave"
            )
        if contract.argument == "sigmas":
            return {"num_inference_steps": steps, "sigmas": list(contract.values), **self.fixed}
        return {"num_inference_steps": None, "timesteps": [int(t) for t in contract.values], **self.fixed}


_CLASSES = "unconditional-image-generation"
_PROMPTED = "text-to-image"
_LATENT = {"output_type": "latent"}

RECIPES = {
    recipe.pipeline: recipe
    for recipe in (
        Recipe("ConsistencyModelPipeline", _CLASSES, ("timesteps",), sized=True, raw={"output_type": "pt"}),
        Recipe("DDPMPipeline", _CLASSES, latents=False, sized=True, raw={"output_type": "pt"}),
        Recipe("DiTPipeline", _CLASSES, fixed=_NO_GUIDANCE, latents=False, seeded=False, raw={"output_type": "pt"}),
        Recipe(
            "StableDiffusionPipeline", _PROMPTED, ("timesteps",), _NO_GUIDANCE, _TEXT, ("prompt_embeds",), raw=_LATENT
        ),
        Recipe(
            "StableDiffusion3Pipeline",
            _PROMPTED,
            ("sigmas",),
            _NO_GUIDANCE,
            _TEXT,
            ("prompt_embeds", "pooled_prompt_embeds"),
            seeded=False,
            raw=_LATENT,
        ),
    )
}


def recipe_of(student: NetworkDenoiser, teacher_pipeline: str | None) -> Recipe:
    """The pipeline that runs the student: diffusers' own for pixel UNets, the teacher's for all others.

    Raises:
        UserError: there is no such pipeline, or fewstep does not know how it is called.
    """
    _refuse_graft(student)
    if type(student.network).__name__ == "UNet2DModel":
        return _for_pixels(student)
    if teacher_pipeline is None:
        raise UserError(
            f"export: {type(student.network).__name__} leaves in its teacher's pipeline, and no teacher is given"
        )
    if teacher_pipeline not in RECIPES:
        raise UserError(f"export: {teacher_pipeline} is not known; {', '.join(RECIPES)} are")
    return RECIPES[teacher_pipeline]


def _refuse_graft(student: NetworkDenoiser) -> None:
    if student.graft.names:
        inputs = ", ".join(student.graft.names)
        raise UserError(
            f"export: {type(student.network).__name__} was given an input ({inputs}) that no stock pipeline feeds, so "
            "it cannot leave; only UNet2DConditionModel has one for the guidance scale"
        )


def _for_pixels(student: NetworkDenoiser) -> Recipe:
    if not isinstance(student.process, Flow):
        return RECIPES["ConsistencyModelPipeline"]
    if student.null is None:
        return RECIPES["DDPMPipeline"]
    raise UserError(
        "export: no stock pipeline runs a UNet2DModel with class labels on flow matching; a VP student can leave, or "
        "an unconditional one"
    )
