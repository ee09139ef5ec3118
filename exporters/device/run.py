"""Run this bundle on this device; start it in the folder that holds manifest.json.

`python -m bundle.run --verify`, `--bench` or `--image x.jpg`; in a pack of candidates `--bench-all`. Needs NumPy
and one of onnxruntime, openvino, TensorRT 10.3 or later; `--image` needs Pillow too. Exit codes: 0 done; 1 a
bug; 2 a mistake or something missing, in one line; 3 a parity gate failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .errors import GateFailed, UserError

ROOT = Path(__file__).resolve().parents[1]
MISTAKE, GATE, INTERRUPTED = 2, 3, 130


class Parser(argparse.ArgumentParser):
    """A parser whose error is one line, as every other message."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's own words."""
        raise UserError(f"{message}; see --help")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"got {text}; expected more than 0, 3600 at most")
    return value


def parser() -> Parser:
    """The command line of the runner."""
    p = Parser(
        prog="bundle.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    action = p.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--verify",
        action="store_true",
        help="check every hash, then the outputs for the parity inputs",
    )
    action.add_argument("--bench", action="store_true", help="measure the latency of one precision")
    action.add_argument(
        "--bench-all", action="store_true", help="measure every network of a pack of candidates"
    )
    action.add_argument("--image", type=Path, nargs="+", help="classify these images")
    p.add_argument(
        "--runtime",
        choices=("auto", "ort", "ov", "trt"),
        default="auto",
        help="auto (default): TensorRT where it and a GPU are present, else ONNX Runtime, else OpenVINO",
    )
    p.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        help="default: fp32; with --verify all that the bundle holds",
    )
    p.add_argument("--threads", type=int, help="of a CPU runtime, default 1")
    p.add_argument(
        "--seconds",
        type=_seconds,
        default=3.0,
        help="of a network, after its warm-up, default 3",
    )
    p.add_argument(
        "--cache",
        type=Path,
        help="folder for compiled models; default: ./cache for TensorRT, none for OpenVINO",
    )
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action and return the exit code."""
    try:
        args = parser().parse_args(argv)
        try:
            from . import actions, contents, pack
        except ImportError as error:
            raise UserError(
                f"NumPy: not importable ({error}); expected 1.21 or later; `pip install numpy`"
            ) from None
        if args.bench_all:
            result = pack.bench_all(pack.Pack.open(ROOT), args)
        else:
            result = actions.run_action(contents.Bundle.open(ROOT), args)
        text = json.dumps(result.document, indent=1) if args.json else "\n".join(result.lines)
        print(text, flush=True)
        if result.failure:
            raise GateFailed(result.failure)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, GateFailed) as error:
        print(f"bundle.run: error: {' '.join(str(error).split())}", file=sys.stderr)
        return GATE if isinstance(error, GateFailed) else MISTAKE
    except KeyboardInterrupt:
        print("bundle.run: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
