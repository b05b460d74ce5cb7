"""The ends of a pipeline in a few lines, with everything about conditions that a cache must keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from fewstep.models.autoencoder import Draws
from fewstep.models.conditioning import Condition

WIDTH, POOLED = 6, 3


class FakeEncoder:
    """Latents are means over 2 × 2 pixels and their mean; prompts are their letters, as long as the longest of a call.

    Attributes:
        seen: every caption that was encoded, call by call.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def prompts(self, captions: Sequence[str]) -> Condition:
        """Tokens `(B, L, WIDTH)` with their mask, pooled ones, sizes, and ids that all prompts share."""
        self.seen.append(tuple(captions))
        return self._told(captions)

    def null(self) -> Condition:
        """The empty prompt, of one token."""
        return self._told([""])

    def _told(self, captions: Sequence[str]) -> Condition:
        length = max(1, *(len(caption) for caption in captions))
        codes = torch.tensor([[ord(c) % 32 for c in caption.ljust(length, "\0")] for caption in captions])
        mask = torch.tensor([[max(1, len(caption)) > i for i in range(length)] for caption in captions])
        text = torch.sin(codes[..., None] * torch.arange(1, WIDTH + 1) / 7)
        batched = {
            "encoder_hidden_states": text * mask[..., None],
            "encoder_attention_mask": mask.long(),
            "added_cond_kwargs.text_embeds": text[:, 0, :POOLED],
            "added_cond_kwargs.time_ids": torch.tensor([[1017.0, 1016.0]]).expand(len(captions), 2),
        }
        shared = {"ids": torch.arange(4).view(2, 2), "shapes": [(1, 2, 2)], "added_cond_kwargs.resolution": None}
        return Condition(batched, shared)

    def latents(self, images: Tensor, generator: Draws = None) -> Tensor:
        """`(B, 4, H/2, W/2)`, a tenth of noise beside where it is drawn."""
        small = nn.functional.avg_pool2d(images, 2)
        mode = torch.cat([small, small.mean(1, keepdim=True)], dim=1)
        return mode if generator is None else mode + 0.1 * randn_tensor(mode.shape, generator)

    def images(self, latents: Tensor) -> Tensor:
        """`(B, 3, H, W)`."""
        return nn.functional.interpolate(latents[:, :3], scale_factor=2)

    def latent_shape(self, side: int) -> tuple[int, ...]:
        """Of one sample."""
        return (4, side // 2, side // 2)
