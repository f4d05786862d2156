"""Wan 2.1, image to video, with sparse attention: python examples/wan_i2v.py cat.png "the cat walks away" """

import argparse

import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from dit_sparse import SparseProc, summary
from dit_sparse.methods import family_options
from dit_sparse.pipelines.text_to_video import text_to_video
from dit_sparse.pipelines.video_io import write_video


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("image", help="file with the first frame")
    parser.add_argument("prompt", help="what happens")
    parser.add_argument("--model", default="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", help="hub id or folder")
    parser.add_argument("--output", default="wan.mp4", help="the clip")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 720), metavar=("WIDTH", "HEIGHT"), help="pixels")
    parser.add_argument("--frames", type=int, default=81, help="1 + a multiple of 4")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    args = parser.parse_args(argv)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    dtypes = {"default": dtype, "vae": torch.float32, "image_encoder": torch.float32}
    pipe = WanImageToVideoPipeline.from_pretrained(args.model, dtype=dtypes).to(device)
    # What the authors of Sparse VideoGen use for Wan at 720p: density .3, a fifth of the steps and layer 0 dense.
    pipe.set_attn_processor(SparseProc("svg", **family_options("svg", "wan")))
    sizes = {"frames": args.frames, "width": args.size[0], "height": args.size[1]}
    picture = Image.open(args.image).convert("RGB").resize(args.size)
    clip = text_to_video(pipe, args.prompt, steps=args.steps, image=picture, **sizes)
    write_video(args.output, clip, fps=16)
    print(summary(pipe), f"written    {args.output}", sep="\n")


if __name__ == "__main__":
    main()
