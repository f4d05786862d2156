"""LTX-Video, text to video, with sparse attention: python examples/ltx.py "a cat walks on the grass" """

import argparse

import torch
from diffusers import LTXPipeline

from dit_sparse import SparseProc, summary
from dit_sparse.methods import family_options
from dit_sparse.pipelines.text_to_video import text_to_video
from dit_sparse.pipelines.video_io import write_video


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a cat walks on the grass", help="what to show")
    parser.add_argument("--model", default="Lightricks/LTX-Video", help="hub id or folder")
    parser.add_argument("--output", default="ltx.mp4", help="the clip")
    parser.add_argument("--size", type=int, nargs=2, default=(704, 512), metavar=("WIDTH", "HEIGHT"), help="pixels")
    parser.add_argument("--frames", type=int, default=161, help="1 + a multiple of 8")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    args = parser.parse_args(argv)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = LTXPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    # From the LTX example of SpargeAttn's authors; its tau, .98, is the one of their other entry points.
    pipe.set_attn_processor(SparseProc("sparge", **family_options("sparge", "ltx")))
    width, height = args.size
    clip = text_to_video(pipe, args.prompt, frames=args.frames, height=height, width=width, steps=args.steps)
    write_video(args.output, clip, fps=24)
    print(summary(pipe), f"written    {args.output}", sep="\n")


if __name__ == "__main__":
    main()
