"""A tiny random DiT whose attention matters: 4 layers of 4 heads on 8x16x16 tokens."""

from typing import Any

import torch

from tests.tiny_wan import build_tiny_wan

CALL = {"height": 256, "width": 256, "num_frames": 15, "num_inference_steps": 10, "guidance_scale": 1.0}
SMALL = {"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 3.0}
PROMPTS = ["a red circle moving left", "a green square growing"]


def build(layers: int = 4, heads: int = 4, gain: float = 4.0) -> Any:
    """The tiny pipeline with another transformer; peaked attention, so that leaving blocks out changes the clip."""
    from diffusers import WanTransformer3DModel

    pipe = build_tiny_wan()
    torch.manual_seed(1)
    model = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=64, num_layers=layers, rope_max_seq_len=64).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.norm_q.weight.mul_(gain)
            block.attn1.to_out[0].weight.mul_(gain)
            block.scale_shift_table[:, 2].fill_(1.0)
    pipe.register_modules(transformer=model)
    # Three channels of the latents are the clip: decoding is not what is tested, and would take most of the time.
    pipe.vae.decode = lambda latents, return_dict=True: (latents[:, :3].tanh(),)
    pipe.set_progress_bar_config(disable=True)
    return pipe
