"""Whether a run's networks can be told what its data set tells, found out before anything is trained."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from fewstep.data.cached import CachedLatents
from fewstep.data.encoding import Encoded
from fewstep.data.fingerprint import weights_digests
from fewstep.data.samples import Dataset
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.load import read_json

ENCODERS = ("vae", "text_encoder")
"""How the names of the components begin that encode."""
_INCIDENTAL = ("transformers_version", "torch_dtype", "dtype", "architectures")
"""Keys of a component's config that change when it is saved again, beside those that begin with an underscore."""

_WIDTHS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "encoder_hidden_states": ("encoder_hid_dim", "joint_attention_dim", "caption_channels", "text_dim",
                                  "cap_feat_dim", "cross_attention_dim"),
        "cap_feats": ("cap_feat_dim",),
        "pooled_projections": ("pooled_projection_dim",),
    }
)  # fmt: skip
"""What networks call the width of an embedding they take, the first name that they have."""


def encoders_digest(folder: Path) -> str:
    """A digest of what a pipeline's VAE and text encoders state of themselves; empty where it has neither."""
    configs = {}
    for component in sorted(p for p in folder.iterdir() if p.name.startswith(ENCODERS) and p.is_dir()):
        path = component / "config.json"
        if path.is_file():
            configs[component.name] = _lasting(read_json(path))
    return hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest() if configs else ""


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _INCIDENTAL}
    return {k: _lasting(v) if isinstance(v, dict) else v for k, v in kept.items()}


def takes_prompts(network: nn.Module) -> bool:
    """Whether the network is told embeddings of text."""
    arguments = inspect.signature(network.forward).parameters
    return any(name.startswith("encoder_hidden_states") or name == "cap_feats" for name in arguments)


def told_by(dataset: Dataset, denoiser: NetworkDenoiser, name: str, folder: Path | None) -> NetworkDenoiser:
    """The denoiser with the null condition that prompts bring, of a cache or encoded by the run.

    Args:
        dataset: of the run.
        denoiser: the teacher or the student.
        name: what messages call it.
        folder: of its pipeline; None where that is not known.

    Raises:
        UserError: the network takes prompts and the data set has none, or the other way round, or the cache was made
            by another teacher.
    """
    latents = dataset if isinstance(dataset, CachedLatents | Encoded) else None
    null = None if latents is None else latents.null
    if takes_prompts(denoiser.network) and null is None:
        has = "class labels and no captions" if dataset.classes else "no captions"
        raise UserError(f"data.name: the {name} is told prompts, and the data set has {has}; give captioned pictures, "
                        "prompts, or a cache that `fewstep cache` made of them")  # fmt: skip
    if latents is None:
        return denoiser
    if null is not None and not takes_prompts(denoiser.network):
        if denoiser.null is not None:
            raise UserError(f"{_place(latents)} holds prompts, and the {name} takes class labels")
        return denoiser
    if isinstance(latents, CachedLatents):
        _refuse_other_encoders(latents, name, folder)
    if null is None:
        return denoiser
    _refuse_other_widths(null, _origin(latents), denoiser.network, name)
    return replace(denoiser, null=null.to(next(denoiser.network.parameters()).device))


def _place(latents: CachedLatents | Encoded) -> str:
    return f"data.path: {latents.folder}" if isinstance(latents, CachedLatents) else "data.name: the set"


def _origin(latents: CachedLatents | Encoded) -> str:
    """What a message says of where embeddings are from."""
    if isinstance(latents, CachedLatents):
        return f"data.path: {latents.folder} was made by {latents.index.plan.teacher}"
    return "data.name: the set is encoded by the teacher"


def _refuse_other_encoders(cache: CachedLatents, name: str, folder: Path | None) -> None:
    plan = cache.index.plan
    digest = "" if folder is None else encoders_digest(folder)
    if digest and plan.encoders and digest != plan.encoders:
        raise UserError(f"data.path: {cache.folder} was made by {plan.teacher}, whose VAE and text encoders are not "
                        f"those of the {name} in {folder}; make one with its own")  # fmt: skip
    here = {} if folder is None else weights_digests(folder, ENCODERS)
    for part, weights in plan.weights.items():
        if here.get(part, weights) != weights:
            raise UserError(f"data.path: {cache.folder} was made by {plan.teacher}, whose {part} has other weights "
                            f"than that of the {name} in {folder}; make one with its own")  # fmt: skip


def _refuse_other_widths(null: Condition, origin: str, network: nn.Module, name: str) -> None:
    config: Mapping[str, Any] = getattr(network, "config", {})
    for key, value in null.batched.items():
        taken = next((config[word] for word in _WIDTHS.get(key, ()) if isinstance(config.get(word), int)), None)
        if taken is not None and value.shape[-1] != taken:
            raise UserError(f"{origin}: its {key} are {value.shape[-1]} wide, the {name} takes {taken}; make one with "
                            "its own")  # fmt: skip
