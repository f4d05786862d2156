"""HunyuanVideo, text to video, with sparse attention: python examples/hunyuan_video.py "a cat walks on the grass" """

import argparse

import torch
from diffusers import HunyuanVideoPipeline

from dit_sparse import SparseProc, summary
from dit_sparse.methods import family_options
from dit_sparse.pipelines.text_to_video import text_to_video
from dit_sparse.pipelines.video_io import write_video


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a cat walks on the grass", help="what to show")
    parser.add_argument("--model", default="hunyuanvideo-community/HunyuanVideo", help="hub id or folder")
    parser.add_argument("--output", default="hunyuan.mp4", help="the clip")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 720), metavar=("WIDTH", "HEIGHT"), help="pixels")
    parser.add_argument("--frames", type=int, default=129, help="1 + a multiple of 4")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    args = parser.parse_args(argv)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = HunyuanVideoPipeline.from_pretrained(args.model, dtype=dtype)
    pipe.enable_model_cpu_offload() if device == "cuda" else pipe.to(device)  # the text encoder leaves the GPU
    pipe.vae.enable_tiling()
    # What the authors of Sparse VideoGen use for HunyuanVideo: density .25, a tenth of the steps and layer 0 dense.
    pipe.set_attn_processor(SparseProc("svg", **family_options("svg", "hunyuan")))
    width, height = args.size
    clip = text_to_video(pipe, args.prompt, frames=args.frames, height=height, width=width, steps=args.steps)
    write_video(args.output, clip, fps=24)
    print(summary(pipe), f"written    {args.output}", sep="\n")


if __name__ == "__main__":
    main()
