"""Stage teach: train or fine-tune the ViT teacher on every label.

On several GPUs or machines: CAKD_LAUNCH="torchrun --nproc-per-node N" (docs/scaling.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline import teach
from pipeline.core import cli, config
from pipeline.data.prepared import Prepared
from pipeline.training import ranks as training_ranks
from pipeline.training.compute import Compute


def main(args: argparse.Namespace) -> None:
    """Train the teacher of `teach:`."""
    settings = config.load(teach.Teach, args.params)
    prepared = Prepared.open(args.prepared)
    with training_ranks.ranks(Compute(device=settings.device).backend()) as ranks:
        description = teach.teach(settings, prepared, args.out, args.work, ranks)
    if ranks.rank:
        return
    size = (args.out / "teacher.safetensors").stat().st_size / 1e6
    print(f"{args.out}: {settings.model}, {size:.1f} MB, {description['labels_seen']} labels seen")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stages.teach", description=__doc__)
    parser.add_argument("prepared", type=Path, help="the prepared folder")
    parser.add_argument("out", type=Path, help="the teacher's folder to write")
    parser.add_argument("--work", type=Path, default=Path(".work/teach"), help="unfinished work")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser, launch="stages.teach")
