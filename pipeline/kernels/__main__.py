"""`python -m pipeline.kernels`: the path this machine takes, and why; `budget`: what every kernel takes."""

from __future__ import annotations

import argparse

import torch

from pipeline import cli
from pipeline.errors import UserError
from pipeline.kernels.choice import IMPLS, choose_gl, choose_pca


def main(args: argparse.Namespace) -> None:
    """Print the choice for this machine's device, or compile everything and write the budget."""
    if args.what == "budget":
        write_budget()
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "pca_loss": choose_pca(args.impl, device, args.tokens, args.width),
        "gl_mse": choose_gl(
            args.impl, device, getattr(torch, args.dtype), args.channels, args.teacher
        ),
    }
    for loss, (name, why) in found.items():
        print(f"{loss} on {device.type}: {name} ({why})")


def write_budget() -> None:
    """Compile every kernel for every architecture; needs triton, no GPU. Raises UserError: no triton."""
    try:
        from pipeline.kernels import ahead
    except ImportError as error:
        raise UserError(f"budget: {error}; `pip install '.[kernels]'`") from None
    for name, found in ahead.write_budget().items():
        print(f"{name}: " + ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in found.items()))
    print(ahead.BUDGET)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="pipeline.kernels", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("choice", "budget"), default="choice")
    parser.add_argument("--impl", default="auto", help=f"one of {', '.join(IMPLS)}")
    parser.add_argument("--tokens", type=int, default=196, help="patch tokens of the teacher")
    parser.add_argument("--width", type=int, default=64, help="of one head")
    parser.add_argument("--channels", type=int, default=512, help="of the student's tap")
    parser.add_argument("--teacher", type=int, default=768, help="width D of the teacher")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    cli.run(main, parser)
