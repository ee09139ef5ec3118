"""The share of calls over report.deadline_ms: counted on every call, with an interval that blocks widen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporters.bench.latency import Block
from exporters.bench.measure import Measurement, save_samples
from pipeline.core.errors import UserError
from pipeline.report import machines
from pipeline.report import page as report_page
from pipeline.report.deadline import over_deadline
from pipeline.report.raw import with_samples
from tests.test_raw import beside
from tests.test_report import (
    OUT,
    TARGETS,
    Run,
    cells,
    run,  # noqa: F811, F401 - the fixture
    stage,
)

BLOCKS, CALLS = 20, 50


def made(seed: int, between: float) -> tuple[Any, Any]:
    """Calls of 20 blocks of 50, a tenth of them late on average; the blocks' shares differ by `between`."""
    generator = np.random.default_rng(seed)
    share = np.clip(0.1 + between * generator.uniform(-1, 1, (BLOCKS, 1)), 0, 1)
    late = generator.uniform(size=(BLOCKS, CALLS)) < share
    return np.where(late, 9.0, 1.0).ravel(), np.arange(BLOCKS) * CALLS


def test_a_call_is_late_from_beyond_the_deadline_on() -> None:
    calls, starts = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 2])
    assert [over_deadline(calls, starts, ms)["share"] for ms in (0.5, 2.0, 4.0)] == [1.0, 0.5, 0.0]


def test_the_interval_holds_the_share_of_all_such_blocks_nineteen_times_in_twenty() -> None:
    found = [over_deadline(*made(seed, 0.1), 5.0)["ci"] for seed in range(200)]
    assert 175 <= sum(low <= 0.1 <= high for low, high in found) <= 198


def test_blocks_that_differ_widen_the_interval_beyond_that_of_independent_calls() -> None:
    (a, b), (c, d) = (over_deadline(*made(0, between), 5.0)["ci"] for between in (0.0, 0.1))
    assert d - c > 1.5 * (b - a) > 0
    assert over_deadline(*made(0, 0.1), 5.0)["ci"] == [c, d]


def test_blocks_count_by_their_calls() -> None:
    calls = np.array([9.0] * 10 + [1.0] * 990)
    starts = np.array([0, 10, 200, 400, 600, 800])
    assert (
        over_deadline(calls, starts, 5.0)["ci"][1] < 0.06
    )  # a draw of blocks alike would give 1/6


@pytest.mark.parametrize(("deadline", "blocks"), [(5.0, 4), (0.5, 20), (10.0, 20)])
def test_there_is_no_interval_of_few_blocks_or_of_none_or_all(deadline: float, blocks: int) -> None:
    calls, starts = made(0, 0.0)
    assert over_deadline(calls, starts[:blocks], deadline)["ci"] is None


def with_deadline(run: Run, deadline_ms: float | None) -> None:  # noqa: F811
    params = run.read("params.yaml")
    params["report"]["deadline_ms"] = deadline_ms
    run.write("params.yaml", params)


def in_blocks(run: Run, target: str) -> None:  # noqa: F811
    """The samples of a made-up target beside its JSON, in blocks of 40 calls."""
    found = run.read(f"bench/{target}.json")
    rows = []
    for row in found["rows"]:
        calls = row.pop("samples_ms")
        blocks = [calls[i : i + 40] for i in range(0, len(calls), 40)]
        rows.append(Measurement({}, [[Block(ms, ms) for ms in blocks]], None))  # type: ignore[arg-type]
    run.write(f"bench/{target}.json", found)
    save_samples(run.folder / "bench" / f"{target}.npz", rows)


def test_the_report_shows_p99_or_the_calls_it_lacks_and_no_deadline_unless_set(run: Run) -> None:  # noqa: F811
    found = run.read("bench/ort-fp32.json")
    for row in found["rows"][:2]:
        row["wall_ms"] |= {"p99": 0.7123, "n": 1200}
    found["rows"][1]["flags"] = ["NOISY", "load 3.0 above 2 cores"]
    run.write("bench/ort-fp32.json", found)
    assert stage(run).returncode == 0
    assert "deadline" not in (run.folder / OUT / "edge.json").read_text().replace(
        '"deadline_ms": null', ""
    )
    text = (run.folder / OUT / "edge.md").read_text().partition("## Tail latency")[2]
    assert cells(text, "ort-fp32")[:5] == ["ort-fp32", "student", "1", "1", "0.712"]
    assert "| ort-fp32 | teacher | 1 | 1 | 0.712 NOISY |" in text
    assert cells(text, "ov-fp32")[4] == "n/a (400 calls)"
    page = (run.folder / OUT / "index.html").read_text()
    assert '<td class="n">0.712<td' in page and "n/a (400 calls)" in page


def test_the_report_counts_the_calls_over_the_deadline_by_target_and_model(run: Run) -> None:  # noqa: F811
    calls = np.array(run.read("bench/ort-fp32.json")["rows"][0]["samples_ms"])
    in_blocks(run, "ort-fp32")
    with_deadline(run, float(np.quantile(calls, 0.9)))
    assert stage(run).returncode == 0
    edge = run.read("out/edge.json")
    student, teacher = (edge["targets"][1][m]["over_deadline"] for m in ("student", "teacher"))
    assert student["share"] == 0.1 and teacher == {"share": 1.0, "ci": None}
    assert 0.02 < student["ci"][0] < 0.1 < student["ci"][1] < 0.2
    text = (run.folder / OUT / "edge.md").read_text().partition("## Tail latency")[2]
    low, high = (f"{100 * end:#.3g}" for end in student["ci"])
    assert cells(text, "ort-fp32")[5] == rf"10.0 \[{low}, {high}\]"
    assert cells(text, "ov-fp32")[5] == "n/a (no single calls)"  # an older file, thinned
    page = report_page.page([machines.read_machine(run.folder / OUT / "edge.json")])
    assert f'<td class="n">10.0 [{low}, {high}]' in page
    assert f"calls over {edge['deadline_ms']:g} ms" in page


@pytest.mark.parametrize("deadline", [0, -1.0, "5", float("nan")])
def test_a_deadline_that_is_no_time_is_refused(run: Run, deadline: Any) -> None:  # noqa: F811
    with_deadline(run, deadline)
    done = stage(run)
    assert done.returncode == 2 and "report.deadline_ms: got" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "starts", [[1, 200], [0, 0, 200], [0, 400], [0, 200, 100], [[0, 200]], [], list(range(500))]
)
def test_blocks_that_do_not_divide_the_calls_are_refused(run: Run, starts: Any) -> None:  # noqa: F811
    beside(run, *TARGETS)
    path = run.folder / "bench" / "ort-fp32.npz"
    with np.load(path) as held:
        arrays = {**held, "0.block_start": np.array(starts, dtype=np.int64)}
    np.savez(path, **arrays)
    bench = run.read("bench/ort-fp32.json")
    with_samples(bench, path.with_suffix(".json"))
    with pytest.raises(UserError, match="ort-fp32.npz: not the calls of ort-fp32.json"):
        with_samples(bench, path.with_suffix(".json"), 1.0)
