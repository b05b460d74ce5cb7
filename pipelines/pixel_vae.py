"""What stands in a latent pipeline's place of a VAE where its network makes pixels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin
from diffusers import ModelMixin as ModelMixin  # diffusers looks for it here, to know how the class is loaded
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor


class PixelVAE(ModelMixin, ConfigMixin):
    """Leaves pixels `(B, C, H, W)` in [-1, 1] as they are: `DiTPipeline` decodes whatever its network makes.

    Args:
        scaling_factor: what the pipeline divides samples by; 1.
    """

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(1))  # a file of weights must hold something, and says the dtype

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """The pixels themselves, first of a tuple."""
        return (x,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """The pixels themselves."""
        return DecoderOutput(sample=z) if return_dict else (z,)
