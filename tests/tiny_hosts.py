"""Tiny complete pipelines with random weights, one of each class that examples/ uses: text encoders and VAE too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.tiny_wan import WORDS, build_tiny_wan

CHANNELS = [8, 8, 8, 8]


def tokenizer(length: int = 32, side: str = "right", words: list[str] | None = None) -> Any:
    """A tokenizer of whole words, built from nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *(words or WORDS)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   model_max_length=length, padding_side=side)


def t5() -> Any:
    """A T5 encoder of one layer, 32 channels."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)).eval()


def clip() -> Any:
    """A CLIP text encoder of one layer, 32 channels."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                        num_attention_heads=4, max_position_embeddings=77, projection_dim=32,
                                        pad_token_id=0, bos_token_id=0, eos_token_id=1)).eval()


def flow() -> Any:
    """The scheduler of the flow models."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def build_hunyuan() -> Any:
    """HunyuanVideoPipeline: Llama, CLIP, 8x8x4 VAE."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from transformers import LlamaConfig, LlamaModel

    llama = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                        max_position_embeddings=512)
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval(), tokenizer=tokenizer(256), text_encoder_2=clip(),
        tokenizer_2=tokenizer(77), scheduler=flow(),
        vae=AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=CHANNELS, layers_per_block=1,
                                      norm_num_groups=4).eval(),
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
            pooled_projection_dim=32, rope_axes_dim=(4, 6, 6)).eval())


def build_cogvideox() -> Any:
    """CogVideoXPipeline: T5, 8x8x4 VAE."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
    from diffusers import CogVideoXTransformer3DModel as Transformer

    vae = AutoencoderKLCogVideoX(block_out_channels=CHANNELS, latent_channels=4, layers_per_block=1, norm_num_groups=2)
    return CogVideoXPipeline(
        tokenizer=tokenizer(226), text_encoder=t5(), vae=vae.eval(), scheduler=CogVideoXDDIMScheduler(),
        transformer=Transformer(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
                                time_embed_dim=8, text_embed_dim=32, num_layers=2, sample_width=12, sample_height=8,
                                sample_frames=17, max_text_seq_length=226,
                                use_rotary_positional_embeddings=True).eval())


def build_ltx() -> Any:
    """LTXPipeline: T5, 32x32x8 VAE."""
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    vae = AutoencoderKLLTXVideo(latent_channels=8, block_out_channels=(8, 8, 8, 8),
                                decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
                                decoder_layers_per_block=(1, 1, 1, 1, 1))
    transformer = LTXVideoTransformer3DModel(in_channels=8, out_channels=8, num_attention_heads=2,
                                             attention_head_dim=16, cross_attention_dim=32, num_layers=2,
                                             caption_channels=32)
    return LTXPipeline(tokenizer=tokenizer(128), text_encoder=t5(), vae=vae.eval(), transformer=transformer.eval(),
                       scheduler=flow())


def build_flux() -> Any:
    """FluxPipeline: CLIP, T5, 8x8 VAE."""
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

    vae = AutoencoderKL(latent_channels=1, block_out_channels=CHANNELS, norm_num_groups=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False)
    transformer = FluxTransformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
                                         num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
                                         axes_dims_rope=(4, 4, 8), guidance_embeds=True)
    return FluxPipeline(scheduler=flow(), vae=vae.eval(), transformer=transformer.eval(), text_encoder=clip(),
                        tokenizer=tokenizer(77), text_encoder_2=t5(), tokenizer_2=tokenizer(512))


def build_qwen_image() -> Any:
    """QwenImagePipeline: Qwen2.5-VL without pictures, 8x8 VAE."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
              "fullatt_block_indexes": [0]}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                 latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    transformer = QwenImageTransformer2DModel(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                                              num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4))
    return QwenImagePipeline(scheduler=flow(), vae=vae.eval(), text_encoder=encoder, tokenizer=tokenizer(1024),
                             transformer=transformer.eval())


def build_wan_i2v() -> Any:
    """WanImageToVideoPipeline: the tiny Wan, with a CLIP that looks at the picture and room for it in the latents."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    wan = build_tiny_wan()
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=16)
    transformer = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=32, in_channels=10, out_channels=4,
                                        text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=256,
                                        image_dim=16, added_kv_proj_dim=64)
    return WanImageToVideoPipeline(
        tokenizer=tokenizer(512), text_encoder=wan.text_encoder, vae=wan.vae, scheduler=wan.scheduler,
        image_encoder=CLIPVisionModel(vision).eval(), transformer=transformer.eval(),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}))


BUILDERS: dict[str, Callable[[], Any]] = {
    "WanPipeline": build_tiny_wan,
    "WanImageToVideoPipeline": build_wan_i2v,
    "HunyuanVideoPipeline": build_hunyuan,
    "CogVideoXPipeline": build_cogvideox,
    "LTXPipeline": build_ltx,
    "FluxPipeline": build_flux,
    "QwenImagePipeline": build_qwen_image,
}


def build_tiny_host(name: str) -> Any:
    """The tiny pipeline of a class of Diffusers, such as "FluxPipeline"; the same weights every time."""
    torch.manual_seed(0)
    return BUILDERS[name]()


def save_tiny_host(name: str, folder: Path) -> Path:
    """Write the tiny pipeline to `folder` and return it."""
    build_tiny_host(name).save_pretrained(folder)
    return folder
