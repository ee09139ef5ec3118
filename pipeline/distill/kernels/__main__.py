"""`python -m pipeline.distill.kernels`: the implementation of each projector loss here, and why."""

from __future__ import annotations

import argparse

import torch

from pipeline.core import cli
from pipeline.distill.kernels.choice import IMPLS, choose_gl, choose_pca


def main(args: argparse.Namespace) -> None:
    """Print the choice for this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choices = {
        "pca_loss": choose_pca(args.impl, device, args.tokens, args.width),
        "gl_mse": choose_gl(
            *(args.impl, device, getattr(torch, args.dtype), args.channels, args.teacher),
            args.tokens,
        ),
    }
    for loss, (name, why) in choices.items():
        print(f"{loss} on {device.type}: {name} ({why})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="pipeline.distill.kernels", description=__doc__)
    parser.add_argument("--impl", default="auto", help=f"one of {', '.join(IMPLS)}")
    parser.add_argument("--tokens", type=int, default=196, help="patch tokens of the teacher")
    parser.add_argument("--width", type=int, default=64, help="of one head")
    parser.add_argument("--channels", type=int, default=512, help="of the student's tap")
    parser.add_argument("--teacher", type=int, default=768, help="width D of the teacher")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    cli.run(main, parser)
