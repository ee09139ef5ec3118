"""`python -m pipeline.kernels`: the path this machine takes, and why; `budget`: what every kernel takes."""

from __future__ import annotations

import argparse

import torch

from pipeline import cli
from pipeline.errors import UserError
from pipeline.kernels.ops import IMPLS, choose


def main(args: argparse.Namespace) -> None:
    """Print the choice for this machine's device, or compile everything and write the budget."""
    if args.what == "budget":
        write_budget()
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, why = choose(args.impl, device, args.tokens, args.width)
    print(f"pca_loss on {device.type}: {name} ({why})")
    print("gl_mse: eager (static permutation, one product a group)")


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
    cli.run(main, parser)
