"""The pipelines of the config group `model`, tiny and random, in diffusers' own classes.

Tests and the benchmark use them in place of models from a hub.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
WORDS = 16  # tokens that the CLIP text encoders take
BLOCKS = {"block_out_channels": (16, 16), "norm_num_groups": 8, "layers_per_block": 1}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of letters."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ", ".join(f'"{token}": {k}' for k, token in enumerate(TOKENS))
    (folder / "vocab.json").write_text(f"{{{vocabulary}}}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=WORDS
    )


def clip_text(projection: bool = False) -> transformers.CLIPTextModel:
    """CLIP's text encoder with 16 features."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WORDS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(config).eval()


def t5_tokenizer() -> transformers.T5Tokenizer:
    """T5's tokenizer with a vocabulary of letters."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    return transformers.T5Tokenizer(vocab=[(piece, -3.0) for piece in pieces], extra_ids=0)


def t5_text(features: int = 16) -> transformers.T5EncoderModel:
    """T5's encoder."""
    config = transformers.T5Config(
        vocab_size=30, d_model=features, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


def autoencoder(latent_channels: int = 4, **options) -> AutoencoderKL:
    """A KL autoencoder that halves the resolution once."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        **BLOCKS,
        **options,
    )


def stable_diffusion(folder: Path) -> DiffusionPipeline:
    """Stable Diffusion 1.5: 16x16 pixels."""
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(folder),
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            **BLOCKS,
        ),
        scheduler=PNDMScheduler(
            **SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder: Path) -> DiffusionPipeline:
    """Stable Diffusion XL: 16x16 pixels, two text encoders, decoded in float32 alone."""
    return StableDiffusionXLPipeline(
        vae=autoencoder(force_upcast=True),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projection=True),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder / "2"),
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
            **BLOCKS,
        ),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
    )


def stable_diffusion_3(folder: Path) -> DiffusionPipeline:
    """Stable Diffusion 3: 16x16 pixels, three text encoders, flow matching."""
    return StableDiffusion3Pipeline(
        vae=autoencoder(shift_factor=0.06),
        text_encoder=clip_text(projection=True),
        text_encoder_2=clip_text(projection=True),
        text_encoder_3=t5_text(32),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder / "2"),
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def pixart(folder: Path) -> DiffusionPipeline:
    """PixArt-alpha: 16x16 pixels, T5."""
    return PixArtAlphaPipeline(
        vae=autoencoder(),
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=16,
            cross_attention_dim=16,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )


def flux(folder: Path) -> DiffusionPipeline:
    """FLUX.1: guidance as an input, dynamically shifted flow matching."""
    return FluxPipeline(
        vae=autoencoder(1, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(),
        text_encoder_2=t5_text(),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def controlnet() -> ControlNetModel:
    """A ControlNet for `stable_diffusion`."""
    model = ControlNetModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(8,) * 2,
        **BLOCKS,
    )
    for block in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight)  # a fresh ControlNet changes nothing
    return model


def depth(folder: Path) -> None:
    """A depth model for ControlNet's maps: a DPT that looks at 32x32 pixels."""
    config = transformers.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    transformers.DPTForDepthEstimation(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.DPTImageProcessor(size=size).save_pretrained(folder)


def latent(folder: Path) -> None:
    """The latent diffusion of CelebA-HQ: 16x16 pixels by a VQ autoencoder."""
    parts = {
        "unet": UNet2DModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **BLOCKS,
        ),
        "vqvae": VQModel(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            num_vq_embeddings=32,
            **BLOCKS,
        ),
        "scheduler": DDIMScheduler(**SCHEDULE, clip_sample=False),
    }
    # codes as far apart as latents are, or all latents would get the same code
    torch.nn.init.normal_(parts["vqvae"].quantize.embedding.weight)
    for name, part in parts.items():
        part.save_pretrained(folder / name)


PIPELINES: dict[str, Callable[[Path], DiffusionPipeline]] = {
    "sd15": stable_diffusion,
    "sd2_base": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "pixart": pixart,
    "flux": flux,
}
FLOW = ("sd3", "flux")  # flow matching, with its own noise schedule
