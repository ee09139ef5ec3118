"""ONNX -> edge bundle, a folder or .tar: models, labels, preprocessing, parity inputs, runner, manifest.

`python -m exporters.bundle student.onnx OUT|OUT.tar [--calib DIR] [--images DIR] [--force]
[--shape B,C,H,W]`
The runner is `exporters/device/`, copied file by file: on the device `python -m bundle.run --verify`
needs NumPy and one runtime, neither this repository nor torch (docs/bundle.md).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from exporters.artifact import agreement
from exporters.artifact.input_shape import add_shape_option, fixed_input
from exporters.artifact.precision import add_force
from exporters.bundle.make import COMMANDS, build_bundle, pack_tar
from exporters.device import contents
from pipeline.core import artifacts, cli
from pipeline.core.atomic import atomic, atomic_dir
from pipeline.core.errors import UserError

ARCHIVES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
# Folders that running a bundle leaves in it: a new bundle may remove them with the old one.
RUN_FOLDERS = ("cache", "__pycache__")


def check_out(out: Path) -> None:
    """Check that `out` may be written. Raises UserError: another kind of archive, or files that are no bundle."""
    if out.suffix in ARCHIVES:
        raise UserError(
            f"{out}: got suffix {out.suffix!r}; expected a folder, or a name ending in .tar"
        )
    if out.suffix == ".tar":
        if out.is_dir():
            raise UserError(f"{out}: expected a .tar file, got a folder; give another name")
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: got a file; expected a folder, or a name ending in .tar")
    if out.is_dir() and (foreign := _foreign(out)):
        raise UserError(f"{out}: holds {foreign}, which is not of a bundle; give a new folder")


def _foreign(folder: Path) -> str | None:
    """A file in `folder` that is neither of a bundle nor left by running one, or None."""
    known: set[str] = set()
    manifest = folder / contents.MANIFEST
    if manifest.is_file():
        try:
            held = artifacts.read_json(manifest)
            if held.get("schema") not in contents.KINDS:
                return contents.MANIFEST
            known = {contents.MANIFEST, *held["files"]}
        except (UserError, KeyError, TypeError):
            return contents.MANIFEST
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        name = path.relative_to(folder)
        if name.as_posix() not in known and not set(name.parts) & set(RUN_FOLDERS):
            return name.as_posix()
    return None


def main(args: argparse.Namespace) -> None:
    """Write the bundle whole or not at all; print a line for each model, for each left out, and for the bundle."""
    check_out(args.out)
    with fixed_input(args.onnx, args.shape) as source:
        manifest, size = write_bundle(args, source)
    print_bundle(args.out, manifest, size)


def write_bundle(args: argparse.Namespace, source: Path) -> tuple[dict[str, Any], int]:
    """Write the bundle of `source` as a folder or .tar; returns its manifest and its size in bytes."""
    if args.out.suffix == ".tar":
        with tempfile.TemporaryDirectory() as folder, atomic(args.out) as temporary:
            manifest = build_bundle(source, Path(folder), args.calib, args.images, args.force)
            pack_tar(Path(folder), temporary, args.out.stem)
        size = args.out.stat().st_size
    else:
        with atomic_dir(args.out) as temporary:
            manifest = build_bundle(source, temporary, args.calib, args.images, args.force)
        size = sum(entry["bytes"] for entry in manifest["files"].values())
    return manifest, size


def print_bundle(out: Path, manifest: dict[str, Any], size: int) -> None:
    """Print a line for each model, for each left out, and for the bundle."""
    for model in manifest["models"]:
        mb = manifest["files"][model["file"]]["bytes"] / 1e6
        parity = agreement.describe_row(model["parity"])
        print(f"{model['file']}: {mb:.2f} MB, for {', '.join(model['runtimes'])}, {parity}")
    for entry in manifest["left_out"]:
        print(
            f"left out: {entry['precision']} for {', '.join(entry['runtimes'])}: {entry['reason']}"
        )
    print(
        f"{out}: {size / 1e6:.2f} MB, {len(manifest['files'])} files, parity on "
        f"{manifest['parity']['inputs']} {manifest['parity']['source']}; on the device: {COMMANDS['verify']}"
    )


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m exporters.bundle`."""
    p = argparse.ArgumentParser(prog="exporters.bundle", description=__doc__)
    add = p.add_argument
    add("onnx", type=Path, help="any fp32 .onnx classifier")
    add("out", type=Path, help="a folder, or a name ending in .tar")
    add(
        "--calib",
        type=Path,
        help="images to calibrate int8 on: a folder of images or a prepared folder",
    )
    add("--images", type=Path, help="images for the parity inputs, other than those of --calib")
    add_force(p)
    add_shape_option(p)
    return p


if __name__ == "__main__":
    cli.run(main, parser())
