"""FLUX.1, text to image, with sparse attention: python examples/flux.py "a cat on the grass" --output cat.png"""

import argparse

import torch
from diffusers import FluxPipeline

from dit_sparse import SparseProc, summary
from dit_sparse.methods import family_options
from dit_sparse.pipelines.text_to_image import text_to_image
from dit_sparse.pipelines.video_io import write_image


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a cat on the grass", help="what to show")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="hub id or folder")
    parser.add_argument("--output", default="flux.png", help="the picture")
    parser.add_argument("--size", type=int, nargs=2, default=(1440, 1440), metavar=("WIDTH", "HEIGHT"), help="pixels")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps")
    args = parser.parse_args(argv)

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = FluxPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    # What the authors of SpargeAttn recommend for every model: half of the blocks in each row, no dense steps.
    pipe.set_attn_processor(SparseProc("sparge", **family_options("sparge", "flux")))
    width, height = args.size
    image = text_to_image(pipe, args.prompt, height=height, width=width, steps=args.steps)
    write_image(args.output, image)
    print(summary(pipe), f"written    {args.output}", sep="\n")


if __name__ == "__main__":
    main()
