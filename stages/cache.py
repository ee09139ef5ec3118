"""Stage cache: write the teacher's features for all views, or with `mode: off` only which views there are.

In several processes, with the same bytes: `torchrun --nproc-per-node N -m stages.cache ...`, or the same command
started again on any machine that has the work folder. Processes may join, leave and be killed (docs/scaling.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.core import cli, config, progress
from pipeline.data.prepared import Prepared
from pipeline.models import teacher
from pipeline.store import writing
from pipeline.store.policy import Cache
from pipeline.training import ranks as training_ranks


def main(args: argparse.Namespace) -> None:
    """Write the feature cache of `cache:`, together with all processes that have the same work folder."""
    settings = config.load(Cache, args.params)
    prepared = Prepared.open(args.prepared)
    live = teacher.load(args.teacher)
    ranks = training_ranks.from_environment()
    total = settings.views * len(prepared.rows("train"))
    bar = progress.Progress("cache", total, quiet=ranks.rank > 0)
    manifest = writing.write(settings, prepared, live, args.out, args.work, bar, ranks)
    if ranks.rank:
        return
    if settings.mode == "off":
        print(f"{args.out}: mode off, no features stored; the teacher will run while distilling")
        return
    worst = max(manifest["error"].values())
    size = sum(s["bytes"] for s in manifest["shards"]) / 1e6
    print(
        f"{args.out}: {manifest['records']} views, {size:.1f} MB, {manifest['dtype']}, "
        f"worst relative error {worst:.1e}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stages.cache", description=__doc__)
    parser.add_argument("prepared", type=Path, help="the prepared folder")
    parser.add_argument("teacher", type=Path, help="teacher.safetensors")
    parser.add_argument("out", type=Path, help="the feature cache to write")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(".work/cache"),
        help="unfinished work",
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser, launch="stages.cache")
