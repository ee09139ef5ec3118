"""`python -m pipeline.kernels`: which kernel path this machine takes, and why."""

from __future__ import annotations

import argparse

import torch

from pipeline import cli
from pipeline.kernels.ops import IMPLS, choose


def main(args: argparse.Namespace) -> None:
    """Print the choice for the asked implementation on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, why = choose(args.impl, device)
    print(f"pca_loss on {device.type}: {name} ({why})")
    print("gl_mse: eager (static permutation, one product a group)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="pipeline.kernels", description=__doc__)
    parser.add_argument("--impl", default="auto", help=f"one of {', '.join(IMPLS)}")
    cli.run(main, parser)
