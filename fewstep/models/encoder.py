"""The ends of a pipeline without its denoiser: captions to conditions, images to latents and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.autoencoder import Autoencoder
from fewstep.models.capture import Capture
from fewstep.models.conditioning import Condition
from fewstep.models.load import first_line, network_class, network_component, read_json, resolve

_UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "transformer_2")


@dataclass(frozen=True, eq=False)
class Encoder:
    """Text encoders and VAE of a pipeline folder.

    Attributes:
        folder: the pipeline's.
        capture: the pipeline, its denoiser without weights.
        listed: names of the components that the folder's index lists.
    """

    folder: Path
    capture: Capture
    listed: tuple[str, ...]

    @torch.no_grad()
    def prompts(self, captions: Sequence[str]) -> Condition:
        """The condition of each caption, as the pipeline would hand it to its denoiser, of `len(captions)` samples.

        Raises:
            UserError: the folder lacks a text encoder.
        """
        self._check_text()
        return self.capture.prompts(captions)

    @torch.no_grad()
    def null(self) -> Condition:
        """The condition, of one sample, that the pipeline's guidance leads away from.

        Raises:
            UserError: the folder lacks a text encoder, and takes no class labels.
        """
        if self.capture.subject == "prompt":
            self._check_text()
        return self.capture.null()

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents `(B, *)` as the denoiser takes them, of `images` `(B, 3, H, W)` in [-1, 1], in float32.

        They are drawn from the VAE's posterior, or its mode without a generator.

        Raises:
            UserError: the folder has no VAE, or the images' sides do not fit it.
        """
        return self._autoencoder.encode(images, generator)

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] of latents `(B, *)`, as the pipeline decodes them.

        Raises:
            UserError: the folder has no VAE.
        """
        return self._autoencoder.decode(latents)

    def latent_shape(self, side: int) -> tuple[int, ...]:
        """The shape of one sample's latents, of square images of `side` pixels.

        Raises:
            UserError: the folder has no VAE, or the side does not fit it.
        """
        return self._autoencoder.shape(side)

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        vae = self.capture.pipeline.components.get("vae")
        if vae is None:
            raise UserError(f"{self.folder}: no vae; latents and images need one")
        return Autoencoder(vae, self.capture.family)

    def _check_text(self) -> None:
        parts = [name for name in self.listed if name.startswith(("text_encoder", "tokenizer"))]
        if not parts:
            kind = type(self.capture.pipeline).__name__
            raise UserError(f"{self.folder}: {kind} has no text encoder; prompts need one")
        for name in parts:
            if self.capture.pipeline.components.get(name) is None:
                raise UserError(f"{self.folder}: no {name}; prompts need it")


def open_encoder(
    path: str,
    device: torch.device | str = "cpu",
    side: int | None = None,
    call: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """The ends of the pipeline at `path`, loaded without its denoiser.

    Args:
        path: a folder or a hub name.
        device: of the text encoders and the VAE.
        side: of the images, which some conditions tell (SDXL's sizes, Flux's positions); None: the pipeline's own.
        call: further arguments of the pipeline's call, such as `num_frames` or `max_sequence_length`.
        dtype: of the text encoders; the VAE computes in float32.

    Raises:
        UserError: there is no pipeline at `path`, or it cannot be read.
    """
    folder = resolve(path)
    index = read_json(folder / "model_index.json")
    component = network_component(folder)
    listed = tuple(name for name, value in index.items() if isinstance(value, list) and value[-1] is not None)
    read_json(folder / "scheduler" / "scheduler_config.json")
    given: dict[str, Any] = {name: None for name in listed if name in _UNUSED or not (folder / name).is_dir()}
    given[component] = hollow(folder / component, device, dtype)
    if "requires_safety_checker" in index:
        given["requires_safety_checker"] = False
    pipeline = _load(folder, given, dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    sized = side is not None and "height" in Capture(pipeline).takes
    size = {"height": side, "width": side} if sized else {}
    return Encoder(folder, Capture(pipeline, {**size, **(call or {})}), listed)


def _load(folder: Path, given: Mapping[str, Any], dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    dtypes: Any = {"default": dtype, "vae": torch.float32}
    try:
        return DiffusionPipeline.from_pretrained(folder, dtype=dtypes, use_safetensors=True, **given)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: the pipeline cannot be read: {first_line(error)}") from error


def hollow(folder: Path, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The network of a folder on `device` without its weights: every value is a view of one zero."""
    from accelerate import init_empty_weights

    config = read_json(folder / "config.json")
    with init_empty_weights():
        network: nn.Module = network_class(config).from_config(config)
    zero = torch.zeros((), device=device, dtype=dtype)
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(zero.expand(value.shape), requires_grad=False))
        for name, value in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, value.to(device), persistent=False)
    return network.eval()
