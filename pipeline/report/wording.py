"""The figures of a summary as the words and numbers a reader sees: one unit a column, "not measured" for a gap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.gain import advice, gain, points
from pipeline.report.verdict import MODELS, fall_back, fell_back, noisy, threads

NONE = "not measured"
Section = Mapping[str, Any]


def figure(value: float | None, digits: int = 3) -> str:
    """A measured value with that many significant digits, without an exponent: "0.412", "1,080"."""
    if value is None:
        return NONE
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(fraction: float | None) -> str:
    """0.9321 -> "93.2"."""
    return NONE if fraction is None else f"{100 * fraction:.1f}"


def millions(value: int | None) -> str:
    """2543210 -> "2.54"."""
    return NONE if value is None else figure(value / 1e6)


def top1(model: Section, split: str) -> str:
    """Top-1 of a split in percent, with one binomial standard error: "90.2 ± 1.5".

    The error counts images: several kinds of noise on one image are not several images.
    """
    score = model.get(split)
    if not score:
        return NONE
    share = score["top1"]
    error = math.sqrt(share * (1 - share) / model["clean"]["n"])
    return f"{percent(share)} ± {100 * error:.1f}"


def against(summary: Section, name: str, baseline: str) -> str:
    """A model's difference of clean top-1 from a baseline, with its interval: "+7.5 [+3.1, +11.9]"."""
    model = summary["models"][name]
    compared = baseline in {**model["points"], **model.get("against", {})}
    return str(gain(summary, name, baseline)) if compared else points(None)


def labels(model: Section) -> str:
    """The labels a model was trained with: "50 of 1,297"."""
    if model.get("labels_seen") is None:
        return NONE
    return f"{model['labels_seen']:,} of {model['labels_total']:,}"


def labels_in_words(models: Section) -> list[str]:
    """Sentences on the labels used, one for all methods with the same number."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, model in models.items():
        if model.get("labels_seen") is not None:
            who = "the teacher" if name == "teacher" else name
            groups.setdefault((model["labels_seen"], model["labels_total"]), []).append(who)
    return [
        f"{enumerate_words(names)} used {used:,} of {total:,} labels ({percent(used / total)} %)."
        for (used, total), names in groups.items()
    ]


def cosines(models: Section) -> str:
    """Mean cosines of the students to the teacher's attention and tokens; empty where not measured."""
    return "; ".join(
        f"{name} " + ", ".join(f"{term} {figure(value)}" for term, value in model["cosine"].items())
        for name, model in models.items()
        if model.get("cosine")
    )


def choice(summary: Section) -> list[str]:
    """Sentences about the students' table: why one of them is exported, and how sure its teacher is."""
    sentences = []
    if chosen := summary.get("selection"):
        sentences.append(f"Exported: {summary['shipped']}, {chosen['reason']}.")
    if sure := summary.get("teacher_r12"):
        sentences.append(
            f"R12 of the teacher: {figure(sure['mean'])}, its largest raw logit over the second largest, mean of "
            f"{sure['views']:,} cached views. Of two teachers the one with the smaller R12 is more likely to "
            "teach well (arXiv 2605.15689)."
        )
    return sentences


def circumstances(targets: Sequence[Section]) -> list[str]:
    """The batch sizes and thread counts behind the milliseconds: "batch 1, 1 thread"."""
    return list(
        dict.fromkeys(
            f"batch {target['student']['batch']}, {threads(target['threads'])}"
            for target in targets
        )
    )


def measured(target: Section) -> list[Section]:
    """The measured rows of a target, at the fewest threads first."""
    rows = [target[model] for model in MODELS] + list(target["more_threads"])
    return [row for row in rows if row["status"] == "measured"]


def enumerate_words(names: Sequence[str]) -> str:
    """["the teacher", "a", "b"] -> "The teacher, a and b"; the name of a method keeps its small letter."""
    text = " and ".join([", ".join(names[:-1])] * (len(names) > 1) + [names[-1]])
    return "T" + text[1:] if text.startswith("the ") else text


def p50(row: Section) -> str:
    """Median latency in ms, NOISY rows marked."""
    if row["status"] != "measured":
        return NONE
    return figure(row["wall_ms"]["p50"]) + (" NOISY" if noisy(row) else "")


def p50_interval(row: Section) -> str:
    """The ends of the 95 % interval of the median, in ms; a dash where it was not measured."""
    ends = row["wall_ms"].get("p50_ci")
    return f"[{figure(ends[0])}, {figure(ends[1])}]" if ends else "–"


def p99(row: Section) -> str:
    """The 99th percentile in ms, NOISY rows marked, or how few calls there are: "n/a (400 calls)"."""
    wall = row["wall_ms"]
    if wall["p99"] is None:
        return f"n/a ({wall['n']:,} calls)"
    return figure(wall["p99"]) + " NOISY" * noisy(row)


def deadline(summary: Section) -> str:
    """`report.deadline_ms` of a run: "16.7 ms"; empty where none was set."""
    return f"{summary['deadline_ms']:g} ms" if summary.get("deadline_ms") else ""


def over_deadline(row: Section) -> str:
    """The share of calls over the deadline in percent with its interval: "0.42 [0.11, 0.90]"."""
    over = row.get("over_deadline")
    if not over:
        return "n/a (no single calls)"
    share, *ends = (figure(100 * value) for value in (over["share"], *(over["ci"] or ())))
    return f"{share} [{', '.join(ends)}]" if ends else share


def energy(row: Section) -> str:
    """Energy of a call in mJ with the share that idle power has in it: "12.3 (71 % idle)"."""
    used = row.get("energy") or {}
    if used.get("joules_per_call") is None:
        return "n/a"
    text = figure(1000 * used["joules_per_call"])
    idle = used["idle_watts"]
    return text if idle is None else f"{text} ({100 * min(1, idle / used['watts']):.0f} % idle)"


def without_energy(rows: Sequence[tuple[str, Section]]) -> str:
    """Why rows have no energy, each reason once; empty where all have one."""
    reasons = [(row.get("energy") or {"reason": "not in this file"})["reason"] for _, row in rows]
    return "; ".join(dict.fromkeys(filter(None, reasons)))


def placed_on(row: Section) -> str:
    """Nodes by location and precision: "CPUExecutionProvider: 12 int8, 2 fp32"; or why that is not known."""
    placed = row.get("placed_on") or {"groups": [], "reason": None}
    places: dict[str, list[str]] = {}
    for group in placed["groups"]:
        count = sum(group["operators"].values())
        precision = group["precision"] + "s" * (group["precision"] == "conversion" and count > 1)
        places.setdefault(group["location"], []).append(f"{count:,} {precision}")
    text = "; ".join(f"{where}: {', '.join(counts)}" for where, counts in places.items())
    return text or f"n/a: {placed['reason'] or 'not in this file'}"


def details(row: Section) -> list[str]:
    """p90, CPU and engine p50, load, first call (ms) and memory (MB) of a row; a dash for a gap."""
    engine = row.get("engine_ms") or {}
    values = [row["wall_ms"]["p90"], row["cpu_ms"]["p50"], engine.get("p50")]
    values += [row[key] for key in ("load_ms", "first_ms", "rss_mb")]
    return ["–" if value is None else figure(value) for value in values]


def speedup(target: Section) -> str:
    """How many times faster the student is, NOISY where either of the two rows is."""
    if target["speedup"] is None:
        return NONE
    return figure(target["speedup"]) + " NOISY" * any(noisy(target[m]) for m in MODELS)


def ratio(block: Section | None) -> str:
    """A ratio with its 95 % interval: "0.141 [0.138, 0.145]"."""
    if not block:
        return NONE
    low, high = figure(block["ci_low"]), figure(block["ci_high"])
    return f"{figure(block['median'])} [{low}, {high}]"


def interval(share: float | None, ends: Sequence[float] | None) -> str:
    """A share in percent with the ends of its interval: "99.0 [97.5, 99.6]"."""
    if share is None or not ends:
        return NONE
    return f"{percent(share)} [{percent(ends[0])}, {percent(ends[1])}]"


def clock(pair: Section) -> str:
    """The clock of a pair in words: CPU time or engine time."""
    return {"cpu": "CPU time", "engine": "engine time on the GPU"}.get(
        pair.get("clock", "cpu"), str(pair.get("clock"))
    )


def day(time: str | None) -> str:
    """The date of an ISO 8601 time, a dash without one."""
    return time[:10] if time else "–"


def left_out(runs: int) -> str:
    """The number of earlier runs that are not shown, in words; empty where all are."""
    if not runs:
        return ""
    return f"{runs} earlier run{'s' * (runs != 1)} of other machines not shown."


def counted(value: object) -> str:
    """A value that a gate compared, as in the file; whole numbers with separators, a dash for nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else flat(value)


def precision(target: Section) -> str:
    """Effective precision of the student, with the requested one and the teacher's where they differ."""
    student, teacher = target["student"], target["teacher"]
    got, requested = student.get("precision_effective"), student.get("precision_requested")
    if student["status"] != "measured":
        return f"{NONE} (requested {requested})" if requested else NONE
    other = [f"requested {requested}"] if fell_back(student) else []
    if teacher["status"] == "measured" and teacher.get("precision_effective") != got:
        other.append(f"teacher {teacher['precision_effective']}")
    return f"{got} ({', '.join(other)})" if other else str(got)


def status(target: Section) -> str:
    """State of a target in a phrase: measured or the reason why not, a fall-back, the causes of NOISY."""
    states: dict[str, list[str]] = {}
    for model in MODELS:
        states.setdefault(_state(target[model]), []).append(model)
    return "; ".join(f"{m[0]} {text}" if len(states) > 1 else text for text, m in states.items())


def _state(row: Section) -> str:
    text = str(row["status"]) + (f": {row['reason']}" if row["reason"] else "")
    text = fall_back(row) if fell_back(row) else text
    return text + (f", NOISY: {', '.join(row['flags'][1:])}" if noisy(row) else "")


def parity(row: Section) -> str:
    """The verdict of an artefact, with what a lower precision costs on the reference images where it is known."""
    verdict = str(row["parity"] or NONE)
    drop = row["top1_drop"]
    return verdict if drop is None else f"{verdict}, top-1 {points(-100 * drop)} points"


def lost(value: float | None) -> str:
    """Percentage points with their sign; empty without a value."""
    return "" if value is None else f"{value:+.1f}"


def board(machine: Section) -> str:
    """Its board or CPU."""
    return str(machine.get("board") or machine.get("cpu") or "unknown machine")


def machine_name(machine: Section) -> str:
    """Board or CPU, cores and GPU of a machine, as a reader names it."""
    cores, gpu = machine.get("cores"), machine.get("gpu")
    names = [board(machine)]
    if cores:
        names.append(f"{cores['usable']} of {cores['logical']} cores")
    if gpu:
        names.append(gpu["name"])
    return ", ".join(names)


def flat(value: object) -> str:
    """A JSON value of a machine or provenance block as one line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {flat(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(flat, value)) or "none"
    return "none" if value is None else str(value)


def headline_target(summary: Section) -> Section | None:
    """The target of the headline: ort-fp32 where it was measured, else the fastest student."""
    measured = [t for t in summary["targets"] if t["student"]["status"] == "measured"]
    return min(
        measured,
        key=lambda t: (t["target"] != "ort-fp32", t["student"]["wall_ms"]["p50"]),
        default=None,
    )


def headline(summary: Section) -> str:
    """The run in one sentence, to follow the verdict's word."""
    parts = []
    best, models = headline_target(summary), summary["models"]
    if summary["shipped"] in models:
        own = percent(models[summary["shipped"]]["clean"]["top1"])
        teacher = models.get("teacher")
        beside = f" (teacher {percent(teacher['clean']['top1'])} %)" if teacher else ""
        parts.append(
            f"{summary['shipped']} reaches {own} % clean top-1{_over_plain(summary)}{beside}"
        )
    if best:
        noise = " (NOISY)" * noisy(best["student"])
        parts.append(f"{figure(best['student']['wall_ms']['p50'])} ms{noise} on {best['target']}")
        if best["speedup"]:
            parts.append(f"{figure(best['speedup'], 2)} times as fast as the teacher")
    if summary["comparisons"]:
        parts.append(compared(summary["comparisons"]))
    if summary["budgets"]:
        passed = sum(b["verdict"] == "PASS" for b in summary["budgets"])
        parts.append(f"{passed} of {len(summary['budgets'])} budgets met")
    sentence = ", ".join(parts) or "nothing was measured"
    reasons = summary["verdict"].get("no_gain", [])
    if not reasons:
        return sentence
    return f"{sentence}. No gain from distillation: {'; '.join(reasons)}; {advice(summary)}"


def _over_plain(summary: Section) -> str:
    """What the exported student gained over plain, for the headline; empty where there is nothing to compare."""
    gained = gain(summary)
    if gained is None or summary["shipped"] == "plain":
        return ""
    return f", {gained} points against plain"


def compared(comparisons: Sequence[Section]) -> str:
    """Count the verdicts of comparisons with a baseline: "2 of 3 against the baseline PASS, 1 FAIL"."""
    verdicts = [str(c["verdict"]) for c in comparisons]
    counts = [f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts))]
    return f"{len(verdicts)} compared with the baseline: {', '.join(counts)}"


def cards(summary: Section) -> list[tuple[str, str, str]]:
    """(label, value, unit) of the headline figures."""
    figures = []
    best, models = headline_target(summary), summary["models"]
    for name in (summary["shipped"], "teacher"):
        if name in models:
            own = percent(models[name]["clean"]["top1"])
            figures.append((f"clean top-1, {name}", own, "%"))
    if best:
        where = f"{best['target']}, {threads(best['threads'])}"
        unit = "ms" + " NOISY" * noisy(best["student"])
        figures.append((f"student p50, {where}", figure(best["student"]["wall_ms"]["p50"]), unit))
        if best["speedup"]:
            figures.append((f"teacher p50 / student p50, {where}", figure(best["speedup"]), "×"))
        figures.append(
            (f"student file, {best['target']}", figure(best["student"]["size_mb"]), "MB")
        )
    if summary["shipped"] in models:
        figures.append(("student parameters", millions(models[summary["shipped"]]["params"]), "M"))
    return figures
