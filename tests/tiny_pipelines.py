"""Whole pipelines of diffusers' own classes, tokenizers included, small enough to build and call in milliseconds.

Nothing is read from disk or from a network. Weights come from fixed seeds, and noise is added to every weight of the
denoisers, whose zero layers would make them say nothing. `build(name)` gives one, `saved(name, folder)` its folder.
Sides are multiples of 32 (Sana's VAE asks for that).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny import alive, clip_tokenizer

library: Any = diffusers  # whose annotations ask for more than its pipelines do
SIDE = 32
"""A side in pixels that every pipeline takes."""

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def t5_tokenizer() -> T5Tokenizer:
    """One token a character."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    scores = [0.0] * 3 + [-2.0] + [-3.0] * (len(pieces) - 4)
    return T5Tokenizer(vocab=list(zip(pieces, scores, strict=True)), extra_ids=0, model_max_length=512)


def gemma_tokenizer() -> GemmaTokenizer:
    """One token a byte."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{i:02X}>" for i in range(256))]
    return GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=512)


def qwen_tokenizer(*more: str) -> Qwen2Tokenizer:
    """One token a byte, or for the whole of each of `more`, with a chat template."""
    marks = ["<|im_start|>", "<|im_end|>", *more]
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", *marks]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=1024, additional_special_tokens=marks)
    made.chat_template = CHAT
    return made


def clip_text(tokenizer: CLIPTokenizer, projected: bool = False, width: int = 32) -> nn.Module:
    """Text embeddings `(B, 77, width)`, and with a projection pooled ones `(B, width)`."""
    ids: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(hidden_size=width, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3,
                            vocab_size=len(tokenizer), projection_dim=width, hidden_act="gelu", **ids)  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_text(tokenizer: T5Tokenizer, width: int = 32, multilingual: bool = False) -> nn.Module:
    """Text embeddings `(B, L, width)`."""
    words: dict[str, Any] = {"d_model": width, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    words |= {"vocab_size": len(tokenizer), "feed_forward_proj": "gated-gelu"}
    return UMT5EncoderModel(UMT5Config(**words)) if multilingual else T5EncoderModel(T5Config(**words))


def gemma_text(tokenizer: GemmaTokenizer, width: int = 16) -> nn.Module:
    """Text embeddings `(B, L, width)`."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "attn_implementation": "eager"}
    return Gemma2Model(Gemma2Config(**sizes, **ids))


def qwen_text(tokenizer: Qwen2Tokenizer, layers: int, causal: bool) -> nn.Module:
    """Text embeddings `(B, L, 16)`."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    return (Qwen3ForCausalLM if causal else Qwen3Model)(Qwen3Config(**sizes, max_position_embeddings=1024))


def qwen_vl_text(tokenizer: Qwen2Tokenizer, width: int = 32) -> nn.Module:
    """Text embeddings `(B, L, width)`; it could see, too."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {**sizes, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}  # fmt: skip
    seen = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=seen))


def vae(scale: float = 0.18215, shift: float | None = None, levels: int = 2) -> AutoencoderKL:
    """Four latent channels, the side divided by 2 for each level but one."""
    blocks: dict[str, Any] = {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    quant: dict[str, Any] = {"use_quant_conv": shift is None, "use_post_quant_conv": shift is None}
    return AutoencoderKL(sample_size=16, latent_channels=4, layers_per_block=1, norm_num_groups=4,
                         mid_block_add_attention=False, scaling_factor=scale, shift_factor=shift,
                         **blocks, **quant)  # fmt: skip


def _flow(**config: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(**config)


TABLE: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_UNET: Mapping[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def _conditional_unet(**config: Any) -> nn.Module:
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    words = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "attention_head_dim": 2}
    return library.UNet2DConditionModel(**{**_UNET, **blocks, **words, **config})


def ddpm() -> DiffusionPipeline:
    """Pixels `(B, 3, 8, 8)`, unconditional."""
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    network = library.UNet2DModel(in_channels=3, out_channels=3, attention_head_dim=8, **_UNET, **blocks)
    return library.DDPMPipeline(network, library.DDPMScheduler())


def dit() -> DiffusionPipeline:
    """Latents `(B, 4, 8, 8)`, 1000 classes, learned variance."""
    network = library.DiTTransformer2DModel(sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8,
                                              num_attention_heads=2, in_channels=4, out_channels=8)  # fmt: skip
    names = {i: f"class{i}" for i in range(1000)}
    return library.DiTPipeline(transformer=network, vae=vae(), scheduler=library.DDIMScheduler(), id2label=names)


def sd15(**unet: Any) -> DiffusionPipeline:
    """Latents `(B, 4, side/2, side/2)`; `unet` changes the network's config."""
    tokenizer = clip_tokenizer()
    scheduler = library.DDIMScheduler(**TABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return library.StableDiffusionPipeline(vae=vae(), text_encoder=clip_text(tokenizer), tokenizer=tokenizer,
        unet=_conditional_unet(**unet), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)  # fmt: skip


def sdxl() -> DiffusionPipeline:
    """As SD1.5, with pooled text and sizes beside, on Euler's scheduler."""
    one, two = clip_tokenizer(), clip_tokenizer()
    network = _conditional_unet(transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
                                addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
                                cross_attention_dim=64, use_linear_projection=True)  # fmt: skip
    scheduler = library.EulerDiscreteScheduler(**TABLE, timestep_spacing="leading", steps_offset=1)
    return library.StableDiffusionXLPipeline(vae=vae(0.13025), text_encoder=clip_text(one), tokenizer=one,
        text_encoder_2=clip_text(two, projected=True), tokenizer_2=two, unet=network, scheduler=scheduler,
        add_watermarker=False)  # fmt: skip


def pixart() -> DiffusionPipeline:
    """Latents `(B, 4, side/2, side/2)`, T5 text, learned variance."""
    network = library.PixArtTransformer2DModel(sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8,
        num_attention_heads=3, caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8)  # fmt: skip
    tokenizer = t5_tokenizer()
    return library.PixArtSigmaPipeline(tokenizer=tokenizer, text_encoder=t5_text(tokenizer), vae=vae(0.13025),
        transformer=network, scheduler=library.DPMSolverMultistepScheduler(**TABLE))  # fmt: skip


def sd3() -> DiffusionPipeline:
    """Latents `(B, 4, side/2, side/2)`, three text encoders, flow matching at shift 3."""
    network = library.SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4, pos_embed_max_size=16)  # fmt: skip
    one, two, three = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    return library.StableDiffusion3Pipeline(transformer=network, scheduler=_flow(shift=3.0),
        vae=vae(1.5305, 0.0609), text_encoder=clip_text(one, projected=True), tokenizer=one,
        text_encoder_2=clip_text(two, projected=True), tokenizer_2=two, text_encoder_3=t5_text(three),
        tokenizer_3=three)  # fmt: skip


def flux(guidance_embeds: bool = False) -> DiffusionPipeline:
    """Packed latents `(B, (side/4)², 16)`, dynamic shift."""
    network = library.FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8], guidance_embeds=guidance_embeds)  # fmt: skip
    one, two = clip_tokenizer(), t5_tokenizer()
    return library.FluxPipeline(scheduler=_flow(shift=3.0, use_dynamic_shifting=True), vae=vae(0.3611, 0.1159),
        text_encoder=clip_text(one), tokenizer=one, text_encoder_2=t5_text(two), tokenizer_2=two,
        transformer=network)  # fmt: skip


def flux_guidance() -> DiffusionPipeline:
    """Flux that is told a guidance scale."""
    return flux(guidance_embeds=True)


def sana() -> DiffusionPipeline:
    """Latents `(B, 4, side/2, side/2)` of a deep-compression VAE."""
    network = library.SanaTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, num_layers=2,
        num_attention_heads=2, attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=16, sample_size=8)  # fmt: skip
    blocks: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        blocks |= {f"{part}_block_types": ("ResBlock", "EfficientViTBlock"), f"{part}_block_out_channels": (8, 8),
                   f"{part}_qkv_multiscales": ((), (5,)), f"{part}_layers_per_block": (1, 1)}  # fmt: skip
    autoencoder = library.AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=2, scaling_factor=0.4,
        downsample_block_type="conv", upsample_block_type="interpolate", **blocks)  # fmt: skip
    tokenizer = gemma_tokenizer()
    return library.SanaPipeline(tokenizer=tokenizer, text_encoder=gemma_text(tokenizer), vae=autoencoder,
        transformer=network, scheduler=_flow(shift=3.0))  # fmt: skip


def sana_sprint() -> DiffusionPipeline:
    """Sana that is told a guidance scale; its scheduler counts in angles, so that it is not one of `PIPELINES`."""
    made: Any = sana()
    network = type(made.transformer).from_config(made.transformer.config, guidance_embeds=True)
    return library.SanaSprintPipeline(tokenizer=made.tokenizer, text_encoder=made.text_encoder, vae=made.vae,
        transformer=network, scheduler=library.SCMScheduler())  # fmt: skip


def wan() -> DiffusionPipeline:
    """Video latents `(B, 16, (frames + 3)/4, side/8, side/8)`."""
    network = library.WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
        in_channels=16, out_channels=16, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32)  # fmt: skip
    autoencoder = library.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True])  # fmt: skip
    tokenizer = t5_tokenizer()
    return library.WanPipeline(tokenizer=tokenizer, text_encoder=t5_text(tokenizer, multilingual=True),
        vae=autoencoder, scheduler=_flow(shift=3.0), transformer=network)  # fmt: skip


def lumina2() -> DiffusionPipeline:
    """Latents `(B, 4, side/8, side/8)`: its pipeline knows no other factor."""
    network = library.Lumina2Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, hidden_size=16,
        num_layers=2, num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=[4, 2, 2],
        axes_lens=[300, 32, 32], cap_feat_dim=16)  # fmt: skip
    tokenizer = gemma_tokenizer()
    return library.Lumina2Pipeline(transformer=network, scheduler=_flow(), vae=vae(0.3611, 0.1159, levels=4),
        text_encoder=gemma_text(tokenizer), tokenizer=tokenizer)  # fmt: skip


def zimage() -> DiffusionPipeline:
    """Latents `(B, 4, side/2, side/2)`, text of as many tokens as it has."""
    network = library.ZImageTransformer2DModel(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32,
        n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32])  # fmt: skip
    for name in ("x_pad_token", "cap_pad_token"):  # made by torch.empty
        nn.init.constant_(network.get_parameter(name), 0.1)
    tokenizer = qwen_tokenizer()
    return library.ZImagePipeline(scheduler=_flow(shift=3.0), vae=vae(0.3611, 0.1159), tokenizer=tokenizer,
        text_encoder=qwen_text(tokenizer, 3, causal=False), transformer=network)  # fmt: skip


def flux2_klein() -> DiffusionPipeline:
    """Packed latents `(B, (side/4)², 16)`; text from the encoder's 9th, 18th and 27th layers."""
    network = library.Flux2Transformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False)  # fmt: skip
    autoencoder = library.AutoencoderKLFlux2(sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), layers_per_block=1, latent_channels=4,
        norm_num_groups=4, mid_block_add_attention=False)  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for name, low in (("running_mean", -0.5), ("running_var", 0.5)):
        autoencoder.bn.get_buffer(name).uniform_(low, low + 1, generator=generator)
    tokenizer = qwen_tokenizer()
    return library.Flux2KleinPipeline(scheduler=_flow(use_dynamic_shifting=True), vae=autoencoder,
        text_encoder=qwen_text(tokenizer, 27, causal=True), tokenizer=tokenizer, transformer=network)  # fmt: skip


_ASKED = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:"
)


def qwen() -> DiffusionPipeline:
    """Packed latents `(B, (side/16)², 16)`, dynamic shift; its words before a prompt are 34 tokens, which it counts."""
    network = library.QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=3, joint_attention_dim=32, axes_dims_rope=(8, 4, 4))  # fmt: skip
    autoencoder = library.AutoencoderKLQwenImage(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.1] * 4, latents_std=[0.9] * 4)  # fmt: skip
    tokenizer = qwen_tokenizer(_ASKED[24:])
    return library.QwenImagePipeline(scheduler=_flow(use_dynamic_shifting=True), vae=autoencoder, tokenizer=tokenizer,
        text_encoder=qwen_vl_text(tokenizer), transformer=network)  # fmt: skip


def cogvideox() -> DiffusionPipeline:
    """Video latents `(B, (frames + 3)/4, 4, side/2, side/2)`, rotary positions, v on a table with a pure-noise end."""
    network = library.CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, time_embed_dim=8, text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=9, max_text_seq_length=24, use_rotary_positional_embeddings=True)  # fmt: skip
    autoencoder = library.AutoencoderKLCogVideoX(down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2, block_out_channels=(8, 8), latent_channels=4, layers_per_block=1,
        norm_num_groups=2, temporal_compression_ratio=4, scaling_factor=0.7)  # fmt: skip
    tokenizer = t5_tokenizer()
    scheduler = library.CogVideoXDDIMScheduler(prediction_type="v_prediction", snr_shift_scale=1.0,
                                               rescale_betas_zero_snr=True, timestep_spacing="trailing")  # fmt: skip
    return library.CogVideoXPipeline(tokenizer=tokenizer, text_encoder=t5_text(tokenizer), vae=autoencoder,
        transformer=network, scheduler=scheduler)  # fmt: skip


def playground() -> DiffusionPipeline:
    """SDXL with EDM's preconditioning."""
    made: Any = sdxl()
    made.register_modules(scheduler=library.EDMEulerScheduler())
    return made


PIPELINES: Mapping[str, Callable[[], DiffusionPipeline]] = MappingProxyType(
    {
        made.__name__: made
        for made in (
            *(ddpm, dit, sd15, sdxl, playground, pixart, sd3, flux, flux_guidance),
            *(sana, wan, lumina2, zimage, flux2_klein, qwen, cogvideox),
        )
    }
)
"""Every pipeline, by name."""


def build(name: str) -> DiffusionPipeline:
    """The pipeline of that name in eval mode; the same weights at every call."""
    return settled(PIPELINES[name])


def settled(make: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    """What `make` builds, in eval mode, its weights from a fixed seed and its denoiser speaking."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = make()
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    alive(denoiser(pipeline))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser(pipeline: DiffusionPipeline) -> nn.Module:
    """The network that denoises."""
    return pipeline.components["transformer" if "transformer" in pipeline.components else "unet"]


def call(name: str, **changes: Any) -> dict[str, Any]:
    """Arguments of one short call: two samples, two steps, no guidance, latents out where the pipeline can."""
    words: dict[str, Any] = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    if name == "ddpm":
        return {"batch_size": 2, **words, **changes}
    words["true_cfg_scale" if name == "qwen" else "guidance_scale"] = 0.0 if name == "zimage" else 1.0
    if name == "dit":
        return {"class_labels": [1, 2], **words, **changes}
    words |= {"prompt": ["a red cat", "a blue dog on a hill"], "height": SIDE, "width": SIDE, "output_type": "latent"}
    if name in ("sana", "pixart"):
        words["use_resolution_binning"] = False
    return {**words, **facts(name), **changes}


def facts(name: str) -> dict[str, Any]:
    """Arguments that make a call of a text-to-image or video pipeline short: few frames, few tokens."""
    if name in ("ddpm", "dit", "sd15", "sdxl", "playground"):
        return {}
    words: dict[str, Any] = {"max_sequence_length": 64 if name in ("zimage", "flux2_klein") else 24}
    if name == "sana":
        words["complex_human_instruction"] = ["Draw:"]
    if name in ("wan", "cogvideox"):
        words["num_frames"] = 1
    return words


def saved(name: str, folder: Path) -> Path:
    """The pipeline in the folder `folder/name`, which it gives back."""
    build(name).save_pretrained(folder / name)
    return folder / name
