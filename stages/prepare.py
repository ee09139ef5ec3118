"""Stage prepare: read a data source and write prepared images with their index."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.core import cli, config
from pipeline.prepare import prepare
from pipeline.prepare.settings import Prepare


def main(args: argparse.Namespace) -> None:
    """Prepare the images of `prepare:`."""
    index = prepare.prepare(config.load(Prepare, args.params), args.out)
    counts = ", ".join(f"{n} {split}" for split, n in index["counts"].items())
    remarks = [*index["notes"], *prepare.remarks(index)]
    print(
        f"{args.out}: {counts}; {len(index['classes'])} classes, {index['image_size']} px; the student sees "
        f"{index['student_labels']} of {index['labelled_train']} training labels",
        *remarks,
        sep="\n  ",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stages.prepare", description=__doc__)
    parser.add_argument("out", type=Path, help="the prepared folder to write")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser)
