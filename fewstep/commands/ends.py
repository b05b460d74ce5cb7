"""What a run on latents needs to be judged by its pictures: text encoders, VAE, and the real pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.commands.real import KINDS
from fewstep.config import RunConfig
from fewstep.data.cached import CachedLatents
from fewstep.data.encoding import Encoded
from fewstep.errors import UserError
from fewstep.models.encoder import Encoder, open_encoder
from fewstep.models.load import pipeline_folder, resolve
from fewstep.training.encoding import encoded_set
from fewstep.training.loop import TrainState


@dataclass(frozen=True, eq=False)
class Ends:
    """Of a run on latents.

    Attributes:
        encoder: text encoders and VAE.
        side: of its pictures in pixels.
    """

    encoder: Encoder
    side: int

    @staticmethod
    def of(state: TrainState) -> Ends | None:
        """Of a run: its own where it encodes its data; None where its samples are pictures.

        Raises:
            UserError: text encoders or VAE are missing.
        """
        data = encoded_set(state.loader.dataset)
        if data is None:
            return None
        if isinstance(data, Encoded):
            assert isinstance(data.encoder, Encoder)
            return Ends(data.encoder, data.pixels.shape[-1])
        side, rest = data.index.plan.size, state.config.memory.encoders == "host"
        return Ends(open_encoder(pipeline_of(state.config, data), state.accelerator.device, side=side, rest=rest), side)


def pipeline_of(config: RunConfig, cache: CachedLatents) -> str:
    """Whose VAE and text encoders: the run's, or those that made the cache."""
    own = config.teacher.path or config.student.path
    return cache.index.plan.teacher if own is None else str(pipeline_folder(resolve(own)))


@dataclass(frozen=True)
class Pictures:
    """A real set as `fewstep evaluate --reference` names it, and further arguments of it."""

    reference: str
    options: Mapping[str, Any] = field(default_factory=dict)


def own_pictures(state: TrainState) -> Pictures:
    """What a run learns from; of a cache, what that was made of.

    Raises:
        UserError: there are no pictures in it.
    """
    data, config = encoded_set(state.loader.dataset), state.config.data
    name, path, options = config.name, config.path, config.options
    if isinstance(data, CachedLatents):
        plan = data.index.plan
        name, path, options = plan.data, plan.path, plan.options
    if name == "prompts":
        raise UserError("evaluate.reference: missing; a run on prompts has no pictures to be measured against; name "
                        "some, as captions:FOLDER")  # fmt: skip
    if path is None:
        return Pictures(name, options)
    bare = {key: value for key, value in options.items() if key != "flip"}
    return Pictures(f"{name}:{path}" if name in KINDS else str(path), bare)
