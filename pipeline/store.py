"""The teacher-feature store: x_L and logits of V views an image, in safetensors shards, refused when stale.

A record is one view of one training image, sample-major: record = position of the image * V + view. A shard holds
`x` (n, P+N, D), `logits` (n, K) float32 and `view_hash` (n,) int64. `manifest.json` holds the policy, the
fingerprint, the hash of every shard and the error measured against the live teacher while writing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline import cli, config, data, files, models, runtime, teacher, views
from pipeline.errors import GateFailed, UserError
from pipeline.views import Geometry

SCHEMA = "cakd.store/1"
LAYOUT = "block_input"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ERROR_GATE = {
    "float32": 1e-6,
    "float16": 5e-4,
    "bfloat16": 4e-3,
}  # relative, worst of q, k, v, h, logits
MEASURE_EVERY = 8  # write batches: the error is that of each eighth
STATISTICS = 512  # records behind the per-channel mean and standard deviation of h


@dataclass(frozen=True)
class Cache:
    """`cache:` which views of each training image the teacher sees, and whether its features are stored."""

    mode: Literal["on", "off"] = "on"  # off: the same views, the teacher runs while distilling
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    views: int = 4  # V views an image
    geometry: Geometry = Geometry()
    batch: int = 64  # images the teacher sees at once while writing
    shard_mb: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("views", "batch", "shard_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")


def fingerprint(
    cache: Cache, prepared: data.Prepared, teacher_description: dict[str, Any]
) -> dict[str, Any]:
    """Every line that decides what the records hold; a store is usable only where all of them agree."""
    return {
        **_surroundings(prepared, teacher_description),
        "geometry": {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(cache.geometry).items()
        },
        "views": cache.views,
        "seed": cache.seed,
        "dtype": cache.dtype,
    }


def _surroundings(prepared: data.Prepared, teacher_description: dict[str, Any]) -> dict[str, Any]:
    """The lines of a fingerprint that a reader can hold against what stands here now."""
    return {
        "teacher": teacher_description["weights_sha256"],
        "images": prepared.images_sha256,
        "order": _order(prepared),
        "view_backend": views.BACKEND,
        "layout": LAYOUT,
        "torch": files.versions()["torch"],
        "timm": files.versions()["timm"],
    }


def _order(prepared: data.Prepared) -> str:
    """Which image each record belongs to: the rows of train, in order."""
    return files.digest(prepared.rows("train").tolist())


def write(
    cache: Cache,
    prepared: data.Prepared,
    live: teacher.Teacher,
    out: Path,
    work: Path,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Run the teacher over every view and publish the store at `out`; resumes shard by shard; the manifest.

    Raises UserError: a value float16 cannot hold, disk full. GateFailed: the dtype's error is over its gate.
    """
    marks = fingerprint(cache, prepared, live.description)
    rows = prepared.rows("train")
    if cache.mode == "on":
        plan(cache, prepared, live, out)
    unfinished = {**marks, "batch": cache.batch, "shard_mb": cache.shard_mb, "code": files.code()}
    with runtime.work_folder(work, files.digest(unfinished)) as folder:
        shards: list[dict[str, Any]] = []
        if cache.mode == "on":
            with runtime.Interrupts() as interrupts:

                def told(done: int) -> None:
                    progress(done)
                    interrupts.leave_if_asked(folder)

                shards = _write_shards(cache, prepared, live, rows, folder, told)
        manifest = _manifest(cache, prepared, live, marks, rows, shards)
        (folder / "store").mkdir(exist_ok=True)
        files.write_json(folder / "store" / "manifest.json", manifest)
        files.publish(folder / "store", out)
    return manifest


def _write_shards(
    cache: Cache,
    prepared: data.Prepared,
    live: teacher.Teacher,
    rows: NDArray[np.int64],
    folder: Path,
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    images, per_shard = rows.repeat(cache.views), _records_per_shard(cache, live, prepared)
    shards = []
    for number, start in enumerate(range(0, len(images), per_shard)):
        records = np.arange(start, min(start + per_shard, len(images)))
        note = folder / "notes" / f"shard-{number:05d}.json"
        shard = folder / "store" / f"shard-{number:05d}.safetensors"
        if not _whole(note, shard):
            made = _make_shard(cache, prepared, live, images, records, progress)
            _save_shard(note, shard, *made)
        shards.append(files.read_json(note))
        progress(int(records[-1]) + 1)
    return shards


def _whole(note: Path, shard: Path) -> bool:
    """True where an earlier run left this shard complete: its note is there and its bytes have the noted hash."""
    if not (note.is_file() and shard.is_file()):
        return False
    return bool(files.read_json(note)["sha256"] == files.sha256(shard))


def _records_per_shard(cache: Cache, live: teacher.Teacher, prepared: data.Prepared) -> int:
    """A whole number of write batches, so that a resumed run sees the same batches as an undisturbed one."""
    one = live.block_input(views.whole(prepared.images[:1]))
    record_bytes = one.numel() * DTYPES[cache.dtype].itemsize
    batches = max(1, cache.shard_mb * 1_000_000 // (record_bytes * cache.batch))
    return int(batches) * cache.batch


def _make_shard(
    cache: Cache,
    prepared: data.Prepared,
    live: teacher.Teacher,
    images: NDArray[np.int64],
    records: NDArray[np.int64],
    progress: Callable[[int], None],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    parts: dict[str, list[Tensor]] = {"x": [], "logits": [], "view_hash": []}
    worst: dict[str, float] = {}
    for at in range(0, len(records), cache.batch):
        chosen = records[at : at + cache.batch]
        batch = views.view_batch(
            prepared.images, cache.geometry, cache.seed, images[chosen], chosen % cache.views
        )
        x = live.block_input(batch)
        stored = _stored(x, cache.dtype)
        exact = live.tail(x)
        if at % (MEASURE_EVERY * cache.batch) == 0:
            errors = relative_errors(live.tail(stored.float()), exact)
            worst = {n: max(e, worst.get(n, 0.0)) for n, e in errors.items()}
        parts["x"].append(stored)
        parts["logits"].append(exact.logits)
        parts["view_hash"].append(torch.from_numpy(views.view_hashes(batch).astype(np.int64)))
        progress(int(chosen[-1]) + 1)
    return {k: torch.cat(v) for k, v in parts.items()}, worst


def _stored(x: Tensor, dtype: str) -> Tensor:
    largest = x.abs().max().item()
    if not np.isfinite(largest):
        raise UserError(
            f"cache: the teacher's features hold {largest}; its weights are broken: teach again"
        )
    if dtype == "float16" and largest > torch.finfo(torch.float16).max:
        raise UserError(
            f"cache.dtype: a feature is {largest:.3g}, float16 ends at 65504; use bfloat16"
        )
    return x.to(DTYPES[dtype])


def relative_errors(got: teacher.Tokens, exact: teacher.Tokens) -> dict[str, float]:
    """||got - exact|| / ||exact|| of q, k, v, h and logits."""
    pairs = {n: (got.qkv[:, :, i], exact.qkv[:, :, i]) for i, n in enumerate("qkv")}
    pairs |= {"h": (got.h, exact.h), "logits": (got.logits, exact.logits)}
    return {n: ((a - b).norm() / b.norm().clamp(min=1e-12)).item() for n, (a, b) in pairs.items()}


def _save_shard(
    note: Path, path: Path, tensors: dict[str, Tensor], errors: dict[str, float]
) -> None:
    try:
        with files.atomic(path) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write ({error}); free space, then run again") from None
    files.write_json(
        note,
        {
            "file": path.name,
            "records": len(tensors["x"]),
            "bytes": path.stat().st_size,
            "sha256": files.sha256(path),
            "error": errors,
        },
    )


def _manifest(
    cache: Cache,
    prepared: data.Prepared,
    live: teacher.Teacher,
    marks: dict[str, Any],
    rows: NDArray[np.int64],
    shards: list[dict[str, Any]],
) -> dict[str, Any]:
    records = sum(s["records"] for s in shards)
    if shards and records != len(rows) * cache.views:
        raise UserError(
            f"cache: {records} records for {len(rows) * cache.views} views; remove .work and run again"
        )
    errors = {n: max(s["error"][n] for s in shards) for n in (*"qkv", "h", "logits") if shards}
    gate = ERROR_GATE[cache.dtype]
    if errors and max(errors.values()) > gate:
        worst = max(errors, key=lambda n: errors[n])
        raise GateFailed(
            f"cache.dtype: {cache.dtype} changes {worst} by {errors[worst]:.2e}, its gate is {gate:.0e}; "
            "use float32"
        )
    mean, std = _statistics(cache, prepared, live, rows)
    return {
        "schema": SCHEMA,
        "mode": cache.mode,
        "dtype": cache.dtype,
        "layout": LAYOUT,
        "views": cache.views,
        "write_batch": cache.batch,
        "images": len(rows),
        "records": records,
        "bytes_per_view": sum(s["bytes"] for s in shards) / records if records else 0,
        "error": errors,
        "h_mean": mean,
        "h_std": std,
        "fingerprint": marks,
        "shards": shards,
        "provenance": files.provenance(asdict(cache)),
    }


def _statistics(
    cache: Cache, prepared: data.Prepared, live: teacher.Teacher, rows: NDArray[np.int64]
) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of h over view 0 of spread images; the same cached or not."""
    chosen = data.spread(rows, STATISTICS)
    tokens = []
    for at in range(0, len(chosen), cache.batch):
        part = chosen[at : at + cache.batch]
        batch = views.view_batch(
            prepared.images, cache.geometry, cache.seed, part, np.zeros_like(part)
        )
        tokens.append(live(batch).h.flatten(0, 1))
    h = torch.cat(tokens).double()
    return h.mean(0).tolist(), h.std(0).clamp(min=1e-6).tolist()


class Store:
    """An opened store: whole, unharmed, and made for this teacher and these images."""

    def __init__(self, folder: Path, prepared: data.Prepared, teacher_path: Path) -> None:
        self.manifest = _open_manifest(folder)
        self.views = int(self.manifest["views"])
        self.geometry = config.parse(Geometry, self._marks["geometry"], f"{folder}: geometry")
        self.seed = int(self._marks["seed"])
        self.position = {int(row): i for i, row in enumerate(prepared.rows("train"))}
        _refuse_stale(folder, self._marks, prepared, models.describe(teacher_path))
        self._shards = [_mapped(folder / s["file"]) for s in self.manifest["shards"]]
        counts = [s["records"] for s in self.manifest["shards"]]
        self._starts = np.cumsum([0, *counts])

    @property
    def _marks(self) -> dict[str, Any]:
        marks: dict[str, Any] = self.manifest["fingerprint"]
        return marks

    @property
    def cached(self) -> bool:
        """False where `cache.mode` is off: only the policy is here."""
        return bool(self.manifest["mode"] == "on")

    def records(self, rows: views.Rows, ks: views.Rows) -> NDArray[np.int64]:
        """Record numbers of view k of each image row."""
        return np.array([self.position[int(r)] * self.views + int(k) for r, k in zip(rows, ks)])

    def read(self, records: NDArray[np.int64]) -> tuple[Tensor, Tensor, NDArray[np.uint64]]:
        """x_L (B, P+N, D) float32, logits (B, K) and the view hashes (B,) of the given records."""
        shard_of = np.searchsorted(self._starts, records, side="right") - 1
        places = list(zip(shard_of, records - self._starts[shard_of]))
        x, logits, hashes = (
            np.stack([self._shards[shard][name][at] for shard, at in places])
            for name in ("x", "logits", "view_hash")
        )
        stored = torch.from_numpy(x)
        if self.manifest["dtype"] == "bfloat16":
            stored = stored.view(torch.bfloat16)
        return stored.float(), torch.from_numpy(logits), hashes.astype(np.uint64)


def _open_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, every shard's size and hash checked. Raises UserError naming the damaged file."""
    manifest = files.read_json(folder / "manifest.json", SCHEMA)
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise UserError(f"{path}: this shard of the feature store is missing; run cache again")
        if path.stat().st_size != shard["bytes"] or files.sha256(path) != shard["sha256"]:
            raise UserError(
                f"{path}: damaged, its bytes are not the {shard['bytes']} written; run cache again"
            )
    return manifest


def _refuse_stale(
    folder: Path, marks: dict[str, Any], prepared: data.Prepared, description: dict[str, Any]
) -> None:
    """Raise UserError with the one line of the fingerprint that differs from what stands here now."""
    for line, value in _surroundings(prepared, description).items():
        if marks.get(line) != value:
            raise UserError(
                f"{folder}: stale feature store: {line} was {marks.get(line)}, is {value}; run cache again"
            )


def _mapped(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file as read-only memory maps; bfloat16 comes as its 16 bits."""
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    return {
        name: np.memmap(
            path,
            dtype=kinds[entry["dtype"]],
            mode="r",
            offset=8 + length + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def verify(folder: Path, prepared: data.Prepared, teacher_path: Path, n: int) -> dict[str, float]:
    """The live teacher against `n` stored records: relative error of each tensor.

    Raises GateFailed: over the gate of its dtype. UserError: damaged, stale, or nothing stored.
    """
    if n < 1:
        raise UserError(f"-n: got {n}; allowed: 1 record or more")
    store = Store(folder, prepared, teacher_path)
    if not store.cached:
        raise UserError(
            f"{folder}: mode is off, no record is stored; set cache.mode: on to store them"
        )
    live = teacher.load(teacher_path)
    total = store.manifest["records"]
    records = np.sort(np.random.default_rng(0).choice(total, min(n, total), replace=False))
    rows, ks = prepared.rows("train")[records // store.views], records % store.views
    batch = views.view_batch(prepared.images, store.geometry, store.seed, rows, ks)
    x, logits, hashes = store.read(records)
    views.check_hashes(batch, hashes, rows)
    errors = relative_errors(replace(live.tail(x), logits=logits), live(batch))
    gate = ERROR_GATE[store.manifest["dtype"]]
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > gate:
        raise GateFailed(
            f"{folder}: {worst} differs by {errors[worst]:.2e} from the live teacher, gate {gate:.0e}"
        )
    return errors


def plan(
    cache: Cache, prepared: data.Prepared, live: teacher.Teacher, folder: Path
) -> dict[str, Any]:
    """What a store of this policy costs here. Raises UserError: the disk is short."""
    x = live.block_input(views.whole(prepared.images[:1]))
    per_view = x.numel() * DTYPES[cache.dtype].itemsize + 4 * len(prepared.classes) + 8
    needed = per_view * cache.views * len(prepared.rows("train"))
    parent = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"{folder}: the store needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; lower cache.views, "
            "or set cache.mode: off"
        )
    return {
        "bytes_per_view": per_view,
        "views": cache.views,
        "images": len(prepared.rows("train")),
        "total_mb": needed / 1e6,
        "free_mb": free / 1e6,
    }


def info(folder: Path) -> dict[str, Any]:
    """What is in a store, after checking every shard."""
    manifest = _open_manifest(folder)
    keys = (
        "mode",
        "bytes_per_view",
        "views",
        "images",
        "records",
        "dtype",
        "layout",
        "fingerprint",
        "error",
    )
    return {key: manifest[key] for key in keys}


def main(args: argparse.Namespace) -> None:
    """`plan`, `verify` and `info` on the command line."""
    if args.command == "info":
        found = info(args.store)
    else:
        prepared = data.Prepared.open(args.prepared)
        if args.command == "verify":
            found = {"relative_error": verify(args.store, prepared, args.teacher, args.n)}
        else:
            cache = config.load(Cache, args.params)
            found = plan(cache, prepared, teacher.load(args.teacher), args.store)
    print(json.dumps(found, indent=1) if args.json else _lines(found))


def _lines(found: dict[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", _lines(value, indent + "  ")]
        else:
            lines.append(
                f"{indent}{key}: {value:.4g}"
                if isinstance(value, float)
                else f"{indent}{key}: {value}"
            )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pipeline.store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("plan", "cost of a feature store here"),
        ("verify", "live teacher against store"),
        ("info", "what is in a store"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("store", type=Path, nargs="?", default=Path("data/features"))
        command.add_argument("--json", action="store_true")
        command.add_argument("--prepared", type=Path, default=Path("data/prepared"))
        command.add_argument(
            "--teacher", type=Path, default=Path("artifacts/teacher/teacher.safetensors")
        )
        command.add_argument("--params", type=Path, default=Path("params.yaml"))
        command.add_argument("-n", type=int, default=64, help="records to verify")
    return parser


if __name__ == "__main__":
    cli.run(main, _parser())
