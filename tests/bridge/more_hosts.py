"""Tiny models of the further families: bound in the same way, tested for the same identities."""

from __future__ import annotations

import torch

from tests.bridge.hosts import Host, ids, randn, time, wan_config, wan_inputs


def flux_config(**kw):
    return {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8), **kw}


def flux_inputs(batch: int, **kw):
    return {"hidden_states": randn(batch, 24, 4), "timestep": time(batch, 0.5),
            "encoder_hidden_states": randn(batch, 6, 16, seed=2), "img_ids": ids(4, 6), "txt_ids": torch.zeros(6, 3),
            **kw}


def sizes(batch: int):
    size = torch.tensor([[32.0, 48.0]] * batch)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(batch, 2)}


def kandinsky_inputs(batch: int):
    return {"hidden_states": randn(1, 3, 6, 8, 4), "encoder_hidden_states": randn(1, 5, 16, seed=2),
            "timestep": time(1), "pooled_projections": randn(1, 8, seed=3),
            "visual_rope_pos": [torch.arange(3), torch.arange(3), torch.arange(4)], "text_rope_pos": torch.arange(5)}


def ltx2_inputs(batch: int):
    return {"hidden_states": randn(batch, 36, 8), "audio_hidden_states": randn(batch, 40, 6, seed=4),
            "encoder_hidden_states": randn(batch, 5, 16, seed=2),
            "audio_encoder_hidden_states": randn(batch, 5, 16, seed=3), "timestep": time(batch),
            "num_frames": 3, "height": 3, "width": 4, "audio_num_frames": 40}


def motif_inputs(batch: int):
    mask = torch.ones(batch, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    return {"hidden_states": randn(batch, 4, 3, 4, 6), "timestep": time(batch),
            "encoder_hidden_states": randn(batch, 6, 16, seed=2), "encoder_attention_mask": mask}


def hunyuanimage_inputs(batch: int):
    mask = torch.ones(batch, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    return {"hidden_states": randn(batch, 4, 4, 6), "timestep": time(batch),
            "encoder_hidden_states": randn(batch, 6, 16, seed=2), "encoder_attention_mask": mask}


def anyflow_inputs(batch: int):
    return {"hidden_states": randn(batch, 3, 4, 8, 6), "timestep": torch.full((batch, 3), 500.0),
            "r_timestep": torch.full((batch, 3), 400.0), "encoder_hidden_states": randn(batch, 7, 16, seed=2)}


MORE = (
    Host("wan-vace", "wan", "WanVACETransformer3DModel",
         wan_config(num_layers=2, vace_layers=[0], vace_in_channels=6),
         lambda b: wan_inputs(b, control_hidden_states=randn(b, 6, 3, 8, 6, seed=4)), (3, 4, 3), 3),
    Host("wan-animate", "wan", "WanAnimateTransformer3DModel",
         wan_config(num_layers=2, in_channels=12, latent_channels=4, image_dim=None, motion_encoder_size=16,
                    motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_style_dim=8, motion_dim=4,
                    motion_encoder_dim=8, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
                    inject_face_latents_blocks=1),
         lambda b: wan_inputs(b, 12, pose_hidden_states=randn(b, 4, 2, 8, 6, seed=4),
                              face_pixel_values=randn(b, 3, 8, 16, 16, seed=5)), (3, 4, 3), 2),
    Host("chronoedit", "wan", "ChronoEditTransformer3DModel", wan_config(num_layers=1), wan_inputs, (3, 4, 3), 1),
    Host("skyreels", "skyreels", "SkyReelsV2Transformer3DModel", wan_config(num_layers=1), wan_inputs, (3, 4, 3), 1),
    Host("anyflow", "anyflow", "AnyFlowTransformer3DModel", wan_config(num_layers=1) | {}, anyflow_inputs,
         (3, 4, 3), 1),
    Host("motif", "motif", "MotifVideoTransformer3DModel",
         {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
          "num_single_layers": 2, "num_decoder_layers": 1, "patch_size": 1, "text_embed_dim": 16,
          "rope_axes_dim": (4, 4, 4)}, motif_inputs, (3, 4, 6), 2, 6, "back"),
    Host("ltx2", "ltx2", "LTX2VideoTransformer3DModel",
         {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 12,
          "cross_attention_dim": 24, "audio_in_channels": 6, "audio_out_channels": 6, "audio_num_attention_heads": 2,
          "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 1, "caption_channels": 16},
         ltx2_inputs, (3, 3, 4), 1),
    Host("kandinsky5", "kandinsky5", "Kandinsky5Transformer3DModel",
         {"in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 8, "out_visual_dim": 4, "model_dim": 24,
          "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 4, 4)},
         kandinsky_inputs, (3, 3, 4), 1),
    Host("easyanimate", "easyanimate", "EasyAnimateTransformer3DModel",
         {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
          "num_layers": 1, "mmdit_layers": 1, "time_embed_dim": 8, "text_embed_dim": 16},
         lambda b: {"hidden_states": randn(b, 4, 3, 6, 8), "timestep": time(b),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2)}, (3, 3, 4), 1, 5, "front"),
    Host("consisid", "cogvideox", "ConsisIDTransformer3DModel",
         {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
          "text_embed_dim": 16, "num_layers": 1, "sample_width": 8, "sample_height": 6, "sample_frames": 9,
          "max_text_seq_length": 5, "use_rotary_positional_embeddings": False},
         lambda b: {"hidden_states": randn(b, 3, 4, 6, 8), "timestep": time(b).long(),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2)}, (3, 3, 4), 1, 5, "front"),
    Host("chroma", "flux", "ChromaTransformer2DModel",
         flux_config(approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=1),
         flux_inputs, (1, 4, 6), 2, 6, "front"),
    Host("flux2", "flux", "Flux2Transformer2DModel",
         {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
          "num_attention_heads": 2, "joint_attention_dim": 16, "timestep_guidance_channels": 8,
          "axes_dims_rope": (4, 4, 4, 4)},
         lambda b: flux_inputs(b, img_ids=ids(4, 6, 4), txt_ids=torch.zeros(6, 4), guidance=torch.full((b,), 3.0)),
         (1, 4, 6), 2, 6, "front"),
    Host("longcat-image", "flux", "LongCatImageTransformer2DModel", flux_config(pooled_projection_dim=8), flux_inputs,
         (1, 4, 6), 2, 6, "front"),
    Host("ovis-image", "flux", "OvisImageTransformer2DModel", flux_config(out_channels=4), flux_inputs,
         (1, 4, 6), 2, 6, "front"),
    Host("bria", "flux", "BriaTransformer2DModel", flux_config(), flux_inputs, (1, 4, 6), 2, 6, "front"),
    Host("bria-fibo", "flux", "BriaFiboTransformer2DModel", flux_config(text_encoder_dim=8),
         lambda b: flux_inputs(b, text_encoder_layers=[randn(b, 6, 8, seed=5)] * 2), (1, 4, 6), 2, 6, "front"),
    Host("hunyuanimage", "hunyuanimage", "HunyuanImageTransformer2DModel",
         {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
          "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16, "rope_axes_dim": (6, 6)},
         hunyuanimage_inputs, (1, 4, 6), 2, 6, "back"),
    Host("cogview3plus", "cogview", "CogView3PlusTransformer2DModel",
         {"in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "out_channels": 4,
          "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 12, "sample_size": 12},
         lambda b: {"hidden_states": randn(b, 4, 8, 12), "timestep": time(b),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2), **sizes(b)}, (1, 4, 6), 1, 5, "front"),
    Host("cogview4", "cogview", "CogView4Transformer2DModel",
         {"in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "out_channels": 4,
          "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 12, "sample_size": 12,
          "rope_axes_dim": (16, 16)},
         lambda b: {"hidden_states": randn(b, 4, 8, 12), "timestep": time(b),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2), **sizes(b)}, (1, 4, 6), 1, 5, "front"),
    Host("auraflow", "auraflow", "AuraFlowTransformer2DModel",
         {"sample_size": 12, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
          "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
          "pos_embed_max_size": 64},
         lambda b: {"hidden_states": randn(b, 4, 8, 12), "timestep": time(b, 0.5),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2)}, (1, 4, 6), 2, 13, "front"),
)
