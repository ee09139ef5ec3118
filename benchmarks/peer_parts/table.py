"""The table of `benchmarks.peers`, from its JSON."""

from __future__ import annotations

from typing import Any

from benchmarks.peer_parts import worker

VIEWS = (1, 4)  # of which the pay-back is given


def payback(result: dict[str, Any], row: dict[str, Any], method: str, views: int) -> float | None:
    """Epochs after which writing `views` views has cost less than the row's running teacher; None: never."""
    own = next(
        r["cpu_s_per_100_images"]
        for r in result["rows"]
        if (r["system"], r["method"]) == ("ours, cached", method)
    )
    saved = (row["cpu_s_per_100_images"] - own) / 100
    cost: float = views * result["writing"]["cpu_s_per_view"]
    return cost / saved if saved > 0 else None


def table(result: dict[str, Any]) -> str:
    """The Markdown tables of steps and of pay-back."""
    rows = [row for row in result["rows"] if "reason" not in row]
    methods = list(rows[0]["cpu_over_cached"])
    names = " / ".join(f"`{method}`" for method in methods)
    lines = [
        "| system | method | img/s with / without data | CPU s per 100 images "
        f"| CPU over ours, cached {names} |",
        "|---|---|--:|--:|--:|",
    ]
    for row in result["rows"]:
        head = f"| {label(result, row['system'])} | {row['method']} |"
        if "reason" in row:
            lines.append(f"{head} {row['reason'].replace('|', '/')} | | |")
            continue
        speeds = f"{row['img_per_s']:.2f} / {row['img_per_s_without_data']:.2f}"
        over = " / ".join(f"{row['cpu_over_cached'][m]:.2f}" for m in methods)
        lines.append(f"{head} {speeds} | {row['cpu_s_per_100_images']:.1f} | {over} |")
    cost, load = result["writing"], result["load_average"]
    lines += [
        "",
        f"Writing takes {cost['cpu_s_per_view']:.3f} CPU s a view; once, with or without a cache, the statistics "
        f"of {cost['statistics_images']} images {cost['statistics_cpu_s']:.1f} CPU s. Load average: "
        f"{load['before']:.1f} before, {load['after']:.1f} after.",
        "",
        "Epochs until writing V views has cost less CPU time than the running teacher of the other system:",
        "",
        "| against | method | "
        + " | ".join(f"cached `{m}`, V = {' / '.join(map(str, VIEWS))}" for m in methods)
        + " |",
        "|---|---|" + "--:|" * len(methods),
    ]
    for row in rows:
        if row["system"] == "ours, cached":
            continue
        cells = [" / ".join(epochs(payback(result, row, m, v)) for v in VIEWS) for m in methods]
        lines.append(f"| {label(result, row['system'])} | {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def epochs(value: float | None) -> str:
    """A number of epochs, as the table shows it."""
    return "never" if value is None else f"{value:.1f}"


def label(result: dict[str, Any], system: str) -> str:
    """A system's name with its version, ours with the type of the cache."""
    if system == "ours, cached":
        return f"{system} {result['dtype']}"
    package = worker.SYSTEMS[system][0] if system in worker.SYSTEMS else ""
    version = result["versions"].get(system, {}).get(package)
    prefix = f"{system}, torch" if package == "torch" else system
    return f"{prefix} {version}" if version else system
