"""torch.compile of a denoiser's network, whole or block by block, in place: the names of its weights stay."""

from __future__ import annotations

from typing import Literal

from torch import nn

from fewstep.models.denoiser import NetworkDenoiser

Mode = Literal["none", "blocks", "whole"]


def compile_network(denoiser: NetworkDenoiser, mode: Mode) -> None:
    """Compile in place. `blocks` compiles each block on its own, which is quick to compile and keeps hooks working."""
    if mode == "whole":
        denoiser.network.compile()
    if mode == "blocks":
        for name in denoiser.family.compute_blocks:
            blocks = denoiser.network.get_submodule(name)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                block.compile()
