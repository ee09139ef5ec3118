"""ONNX -> the edge bundle: models, labels, preprocessing, parity inputs, runner and manifest, a folder or a .tar.

`python -m exporters.bundle student.onnx OUT|OUT.tar [--calib DIR] [--images DIR]`
The runner is `exporters/device/`, copied file by file: on the device `python -m bundle.run --verify`
needs NumPy and one runtime, neither this repository nor torch (docs/bundle.md).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from exporters.artifact import agreement
from exporters.bundle.make import COMMANDS, build_bundle, pack_tar
from exporters.device import contents
from pipeline.core import artifacts, cli
from pipeline.core.atomic import atomic, atomic_dir
from pipeline.core.errors import UserError

ARCHIVES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
# the only folders a new bundle may take away with the old
MADE_ON_DEVICE = ("cache", "__pycache__")


def check_out(out: Path) -> None:
    """`out` may be written. Raises UserError: another kind of archive, or something there that is no bundle."""
    if out.suffix in ARCHIVES:
        raise UserError(
            f"{out}: suffix is {out.suffix!r}; allowed: a folder, or a name ending in .tar"
        )
    if out.suffix == ".tar":
        if out.is_dir():
            raise UserError(f"{out}: is a folder; give another name for the .tar")
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder, or a name ending in .tar")
    if out.is_dir() and (foreign := _foreign(out)):
        raise UserError(f"{out}: holds {foreign}, which no bundle put there; give a new folder")


def _foreign(folder: Path) -> str | None:
    """A file in `folder` that is neither of a bundle there nor made by running it."""
    known: set[str] = set()
    manifest = folder / contents.MANIFEST
    if manifest.is_file():
        try:
            known = {contents.MANIFEST, *artifacts.read_json(manifest, contents.SCHEMA)["files"]}
        except (UserError, KeyError, TypeError):
            return contents.MANIFEST
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        name = path.relative_to(folder)
        if name.as_posix() not in known and not set(name.parts) & set(MADE_ON_DEVICE):
            return name.as_posix()
    return None


def main(args: argparse.Namespace) -> None:
    """Write the bundle whole or not at all; one line a model, one for what was left out, one for the bundle."""
    check_out(args.out)
    if args.out.suffix == ".tar":
        with tempfile.TemporaryDirectory() as folder, atomic(args.out) as temporary:
            manifest = build_bundle(args.onnx, Path(folder), args.calib, args.images)
            pack_tar(Path(folder), temporary, args.out.stem)
        size = args.out.stat().st_size
    else:
        with atomic_dir(args.out) as temporary:
            manifest = build_bundle(args.onnx, temporary, args.calib, args.images)
        size = sum(entry["bytes"] for entry in manifest["files"].values())
    for model in manifest["models"]:
        mb = manifest["files"][model["file"]]["bytes"] / 1e6
        told = agreement.describe_row(model["parity"])
        print(f"{model['file']}: {mb:.2f} MB, for {', '.join(model['runtimes'])}, {told}")
    for entry in manifest["left_out"]:
        print(
            f"left out: {entry['precision']} for {', '.join(entry['runtimes'])}: {entry['reason']}"
        )
    print(
        f"{args.out}: {size / 1e6:.2f} MB, {len(manifest['files'])} files, parity on "
        f"{manifest['parity']['inputs']} {manifest['parity']['source']}; there: {COMMANDS['verify']}"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="exporters.bundle", description=__doc__)
    add = p.add_argument
    add("onnx", type=Path, help="an fp32 .onnx file, ours or anyone's")
    add("out", type=Path, help="a folder, or a name ending in .tar")
    add("--calib", type=Path, help="images to calibrate int8 on: a folder or a prepared one")
    add("--images", type=Path, help="images for the parity inputs, none of --calib")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
