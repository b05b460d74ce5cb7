"""The ends of a pipeline without its denoiser: captions to conditions, images to latents and back."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.autoencoder import Autoencoder, Draws
from fewstep.models.capture import Capture
from fewstep.models.conditioning import Condition
from fewstep.models.exported import is_exported
from fewstep.models.load import first_line, network_class, network_component, pipeline_folder, read_json, resolve
from fewstep.models.resting import Resting
from fewstep.models.stored_inputs import plain_config

_UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "transformer_2")
_TEXT = ("text_encoder", "tokenizer")


@dataclass(frozen=True, eq=False)
class Encoder:
    """Text encoders and VAE of a pipeline folder.

    Attributes:
        folder: the pipeline's.
        capture: the pipeline, its denoiser without weights.
        listed: names of the components that the folder's index lists.
        device: where they compute, and what they make lies.
        resting: of text encoders and VAE that wait in the host's memory; None: they stay on the device.
    """

    folder: Path
    capture: Capture
    listed: tuple[str, ...]
    device: torch.device
    resting: Resting | None = None

    @torch.no_grad()
    def prompts(self, captions: Sequence[str]) -> Condition:
        """The condition of each caption, as the pipeline would hand it to its denoiser, of `len(captions)` samples.

        Raises:
            UserError: the folder lacks a text encoder.
        """
        self._check_text()
        with self._visited():
            return self.capture.prompts(captions)

    @torch.no_grad()
    def null(self) -> Condition:
        """The condition, of one sample, that the pipeline's guidance leads away from.

        Raises:
            UserError: the folder lacks a text encoder, and takes no class labels.
        """
        if self.capture.subject == "prompt":
            self._check_text()
        with self._visited():
            return self.capture.null()

    def latents(self, images: Tensor, generator: Draws = None) -> Tensor:
        """Latents `(B, *)` as the denoiser takes them, of `images` `(B, 3, H, W)` in [-1, 1], in float32.

        They are drawn from the VAE's posterior, by one generator or one for each sample, or its mode without.

        Raises:
            UserError: the folder has no VAE, or the images' sides do not fit it.
        """
        with self._visited():
            return self._autoencoder.encode(images, generator)

    @torch.no_grad()
    def images(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] of latents `(B, *)`, as the pipeline decodes them.

        Args:
            latents: `(B, *)`.
            size: height and width of the images in pixels, which packed latents do not tell; None: they are square.

        Raises:
            UserError: the folder has no VAE, or packed latents are of images of another size.
        """
        with self._visited():
            return self._autoencoder.decode(latents, size)

    @property
    def has_posterior(self) -> bool:
        """Whether the VAE says a distribution, from which latents can be drawn.

        Raises:
            UserError: the folder has no VAE.
        """
        with self._visited():
            return self._autoencoder.has_posterior

    def latent_shape(self, side: int | tuple[int, int]) -> tuple[int, ...]:
        """The shape of one sample's latents, of images of `side` × `side` pixels, or of that height and width.

        Raises:
            UserError: the folder has no VAE, or a side does not fit it.
        """
        with self._visited():
            return self._autoencoder.shape(side)

    def side(self, rows: int) -> int:
        """Height or width in pixels of images whose latents, not packed, have so many rows or columns.

        Raises:
            UserError: the folder has no VAE.
        """
        with self._visited():
            return self._autoencoder.side(rows)

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        vae = self.capture.pipeline.components.get("vae")
        if vae is None:
            raise UserError(f"{self.folder}: no vae; latents and images need one")
        return Autoencoder(vae, self.capture.family, self.device)

    def _visited(self) -> AbstractContextManager[None]:
        return nullcontext() if self.resting is None else self.resting.visits()

    def _check_text(self) -> None:
        parts = [name for name in self.listed if name.startswith(_TEXT)]
        if not parts:
            kind = type(self.capture.pipeline).__name__
            raise UserError(f"{self.folder}: {kind} has no text encoder; prompts need one")
        for name in parts:
            if self.capture.pipeline.components.get(name) is None:
                raise UserError(f"{self.folder}: no {name}; prompts need it")


def open_encoder(
    path: str,
    device: torch.device | str = "cpu",
    side: int | tuple[int, int] | None = None,
    call: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    rest: bool = False,
    parts: Literal["all", "vae"] = "all",
) -> Encoder:
    """The ends of the pipeline at `path`, loaded without its denoiser.

    Args:
        path: a folder or a hub name.
        device: where the text encoders and the VAE compute.
        side: of the images, or their height and width, which some conditions tell (SDXL's sizes, Flux's positions);
            None: the pipeline's own.
        call: further arguments of the pipeline's call, such as `num_frames` or `max_sequence_length`.
        dtype: of the text encoders; the VAE computes in float32.
        rest: whether they wait in the host's memory, and visit the device one at a time.
        parts: whether to leave out the text encoders, for latents alone.

    Raises:
        UserError: there is no pipeline at `path`, or it cannot be read.
    """
    folder = pipeline_folder(resolve(path))
    index = read_json(folder / "model_index.json")
    component = network_component(folder)
    listed = tuple(name for name, value in index.items() if isinstance(value, list) and value[-1] is not None)
    read_json(folder / "scheduler" / "scheduler_config.json")
    unused = _UNUSED if parts == "all" else (*_UNUSED, *(name for name in listed if name.startswith(_TEXT)))
    given: dict[str, Any] = {name: None for name in listed if name in unused or not (folder / name).is_dir()}
    given[component] = hollow(folder / component, device, dtype)
    if "requires_safety_checker" in index:
        given["requires_safety_checker"] = False
    if is_exported(folder):
        given["scheduler"] = _any_scheduler(folder)
        _import_own(index)
    pipeline = _load(folder, given, dtype)
    pipeline.set_progress_bar_config(disable=True)
    resting = _rested(pipeline, component, torch.device(device)) if rest else None
    if resting is None:
        pipeline.to(torch.device(device))
    usual = {**_sides(side), "num_frames": 1}  # the latents are a picture's
    takes = Capture(pipeline).takes
    capture = Capture(pipeline, {**{key: value for key, value in usual.items() if key in takes}, **(call or {})})
    return Encoder(folder, capture, listed, torch.device(device), resting)


def _rested(pipeline: Any, denoiser: str, device: torch.device) -> Resting:
    """Every network of the pipeline but its denoiser waits on the host."""
    modules = {name: one for name, one in pipeline.components.items() if isinstance(one, nn.Module)}
    return Resting([one for name, one in modules.items() if name != denoiser], device)


def _sides(side: int | tuple[int, int] | None) -> dict[str, int]:
    """What a pipeline's call is told of the images' size."""
    if side is None:
        return {}
    height, width = side if isinstance(side, tuple) else (side, side)
    return {"height": height, "width": width}


def _load(folder: Path, given: Mapping[str, Any], dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    dtypes: Any = {"default": dtype, "vae": torch.float32}
    try:
        return DiffusionPipeline.from_pretrained(folder, dtype=dtypes, use_safetensors=True, **given)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: the pipeline cannot be read: {first_line(error)}") from error


def _any_scheduler(folder: Path) -> Any:
    """In place of an export's, which may refuse all steps but its student's; conditions do not depend on it."""
    import diffusers

    name = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name", "")
    if name.startswith("Flow"):
        return diffusers.FlowMatchEulerDiscreteScheduler()
    if name.startswith("SCM"):
        return diffusers.SCMScheduler()
    if name.startswith("EDM"):
        return diffusers.EDMEulerScheduler()
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


def _import_own(index: Mapping[str, Any]) -> None:
    """Import the modules of fewstep's own classes in an export: diffusers imports nothing that a folder names."""
    named = {value[0] for value in index.values() if isinstance(value, list) and isinstance(value[0], str)}
    for module in sorted(named):
        if module.startswith("fewstep.pipelines."):
            importlib.import_module(module)


def hollow(folder: Path, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The network of a folder on `device` without its weights: every value is a view of one zero."""
    from accelerate import init_empty_weights

    config = read_json(folder / "config.json")
    with init_empty_weights():
        network: nn.Module = network_class(config).from_config(plain_config(config))
    zero = torch.zeros((), device=device, dtype=dtype)
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(zero.expand(value.shape), requires_grad=False))
        for name, value in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, value.to(device), persistent=False)
    return network.eval()
