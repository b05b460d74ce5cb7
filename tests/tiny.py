"""Networks of diffusers' own classes, small enough to run in milliseconds, with weights from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

Network = TypeVar("Network", bound=nn.Module)


def _seeded(build: Callable[[], Network]) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def unet2d(size: int = 8, channels: int = 3) -> UNet2DModel:
    """Unconditional, `(B, channels, size, size)`; mid block `(B, 16, size/2, size/2)`."""
    return _seeded(
        lambda: UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )


def unet_sd15(size: int = 8) -> UNet2DConditionModel:
    """Latents `(B, 4, size, size)`, text embeddings `(B, N, 16)`; mid block `(B, 16, size/2, size/2)`."""
    return _seeded(
        lambda: UNet2DConditionModel(
            sample_size=size,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
        )
    )


def dit(size: int = 8, classes: int = 10) -> DiTTransformer2DModel:
    """Latents `(B, 4, size, size)` and class labels, learned variance; two blocks of `(B, (size/2)², 16)` tokens."""
    return _seeded(
        lambda: DiTTransformer2DModel(
            sample_size=size,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_embeds_ada_norm=classes,
        )
    )


def sd3(size: int = 8) -> SD3Transformer2DModel:
    """Latents `(B, 4, size, size)`, text `(B, N, 24)` and `(B, 12)`; two blocks of `(B, (size/2)², 16)` tokens."""
    return _seeded(
        lambda: SD3Transformer2DModel(
            sample_size=size,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            caption_projection_dim=16,
            joint_attention_dim=24,
            pooled_projection_dim=12,
            pos_embed_max_size=size,
        )
    )


def inputs(network: nn.Module, batch: int = 2, size: int = 8) -> dict[str, Tensor]:
    """Keyword arguments of one call; the noisy sample comes first."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    t = torch.full((batch,), 500.0)
    match network:
        case UNet2DModel():
            return {"sample": randn(network.config["in_channels"], size, size), "timestep": t}
        case UNet2DConditionModel():
            return {"sample": randn(4, size, size), "timestep": t, "encoder_hidden_states": randn(5, 16)}
        case DiTTransformer2DModel():
            return {"hidden_states": randn(4, size, size), "timestep": t.long(), "class_labels": torch.arange(batch)}
        case SD3Transformer2DModel():
            x, text, pooled = randn(4, size, size), randn(5, 24), randn(12)
            return {"hidden_states": x, "timestep": t, "encoder_hidden_states": text, "pooled_projections": pooled}
    raise AssertionError(f"no example inputs for {type(network).__name__}")


def unet2d_classes(size: int = 8, classes: int = 4, channels: int = 3) -> UNet2DModel:
    """As `unet2d`, with class labels 0 to `classes` − 1 and the null label after them."""
    config: dict[str, Any] = {**unet2d(size, channels).config, "num_class_embeds": classes + 1}
    return _seeded(lambda: UNet2DModel(**{key: value for key, value in config.items() if not key.startswith("_")}))


def alive(network: Network, std: float = 0.05) -> Network:
    """The network with noise on every parameter: layers that start at zero would make it say nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return network


def vae(**config: Any) -> AutoencoderKL:
    """Four latent channels, half the side."""
    blocks: dict[str, Any] = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    sizes: dict[str, Any] = {"sample_size": 16, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    return _seeded(lambda: AutoencoderKL(**blocks, **sizes, mid_block_add_attention=False, **config))


def clip_tokenizer() -> CLIPTokenizer:
    """One token a byte, made from nothing on disk."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def clip_text(tokenizer: CLIPTokenizer, width: int = 16) -> CLIPTextModel:
    """Text embeddings `(B, 77, width)`."""
    ids: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(tokenizer),
        **ids,
    )
    return _seeded(lambda: CLIPTextModel(config))


def sd15_pipeline() -> StableDiffusionPipeline:
    """A whole text-to-image pipeline, of ε-prediction on SD1.5's noise table."""
    tokenizer = clip_tokenizer()
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**table, clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_text(tokenizer),
        tokenizer=tokenizer,
        unet=alive(unet_sd15()),
        scheduler=scheduler,  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def dit_pipeline(classes: int = 10) -> DiTPipeline:
    """A whole class-conditional latent pipeline."""
    return DiTPipeline(alive(dit(classes=classes)), vae(), DDIMScheduler())  # pyright: ignore[reportArgumentType]


def sd3_pipeline(shift: float = 3.0) -> StableDiffusion3Pipeline:
    """A text-to-image pipeline on flow matching, its text encoders left out: prompts come as embeddings."""
    return StableDiffusion3Pipeline(
        transformer=alive(sd3()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        ),  # pyright: ignore[reportArgumentType]
    )
