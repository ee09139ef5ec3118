"""The timing protocol on made clocks and made numbers; one test times a real sleep and a real loop."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from exporters.bench import latency
from exporters.bench.latency import (
    Block,
    cpu_ratio,
    row_flags,
    summarise_calls,
)
from exporters.device import timing
from exporters.device.timing import cycle_inputs, median_interval, run_block, schedule, warm_up

ROOT = Path(__file__).parents[1]
PICTURES = [np.full((1, 3, 2, 2), i, dtype=np.float32) for i in range(4)]


class Clock:
    """A clock that only work moves: `run` takes the next of `costs` in ms, of which `share` is CPU time."""

    def __init__(self, costs: Iterator[float], share: float = 1.0) -> None:
        self.wall = self.cpu = 0.0
        self.costs, self.share = costs, share

    def run(self, x: object) -> None:
        cost = next(self.costs)
        self.wall += cost
        self.cpu += cost * self.share


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    def start(costs: Iterator[float], share: float = 1.0) -> Clock:
        made = Clock(costs, share)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: made.wall / 1e3)
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: round(made.wall * 1e6))
        monkeypatch.setattr(timing.time, "process_time_ns", lambda: round(made.cpu * 1e6))
        return made

    return start


def steady(ms: float) -> Iterator[float]:
    while True:
        yield ms


def test_a_block_times_each_call_in_wall_and_cpu_until_its_time_is_up(
    clock: Callable[..., Clock],
) -> None:
    made = clock(steady(40.0), share=0.5)
    block = run_block(made.run, cycle_inputs(PICTURES), 0.15)
    assert block.wall_ms == pytest.approx([40.0] * 4)
    assert block.cpu_ms == pytest.approx([20.0] * 4)


def test_a_block_runs_once_however_slow_the_call(clock: Callable[..., Clock]) -> None:
    made = clock(steady(900.0))
    assert run_block(made.run, cycle_inputs(PICTURES), 0.15).wall_ms == [900.0]
    assert run_block(made.run, cycle_inputs(PICTURES), 0.0).wall_ms == [900.0]  # even out of time


def test_a_block_gives_every_buffer_its_turn(clock: Callable[..., Clock]) -> None:
    made = clock(steady(25.0))
    seen = []
    run_block(lambda x: (seen.append(float(x.flat[0])), made.run(x)), cycle_inputs(PICTURES), 0.15)
    assert seen == [0, 1, 2, 3, 0, 1]


def test_too_few_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3 input buffers; expected 4"):
        cycle_inputs(PICTURES[:3])


def test_real_clocks_tell_sleep_from_work() -> None:
    asleep = run_block(lambda x: time.sleep(0.02), cycle_inputs(PICTURES), 0.1)
    assert min(asleep.wall_ms) >= 20 and max(asleep.cpu_ms) < 10
    awake = run_block(lambda x: sum(range(200_000)), cycle_inputs(PICTURES), 0.1)
    assert (
        max(c / w for c, w in zip(awake.cpu_ms, awake.wall_ms, strict=True)) > 0.5
    )  # a call left in peace


def test_warm_up_ends_when_three_block_medians_agree(clock: Callable[..., Clock]) -> None:
    falling = iter([160.0, 158.0, 230.0] + [151.0] * 20)
    warm = warm_up(clock(falling).run, cycle_inputs(PICTURES))
    assert warm.stable
    assert warm.seconds == pytest.approx((160 + 158 + 230 + 3 * 151) / 1e3)


def test_warm_up_gives_up_after_its_limit_and_says_so(clock: Callable[..., Clock]) -> None:
    rising = (150.0 * 1.02**i for i in range(100))
    warm = warm_up(clock(rising).run, cycle_inputs(PICTURES), limit=1.0)
    assert not warm.stable and 1.0 <= warm.seconds < 1.3


def test_a_call_longer_than_the_limit_still_gets_three_blocks(clock: Callable[..., Clock]) -> None:
    assert warm_up(clock(steady(3000.0)).run, cycle_inputs(PICTURES)) == timing.WarmUp(9.0, True)


@pytest.mark.parametrize(
    ("n", "known"), [(1, ()), (99, ()), (100, ("p90",)), (999, ("p90",)), (1000, ("p90", "p99"))]
)
def test_percentiles_are_given_only_where_enough_calls_carry_them(
    n: int, known: tuple[str, ...]
) -> None:
    wall = summarise_calls([Block([float(i + 1) for i in range(n)], [1.0] * n)])["wall_ms"]
    assert wall["n"] == n and wall["min"] == 1 and wall["p50"] == pytest.approx((n + 1) / 2)
    assert tuple(k for k in ("p90", "p99") if wall[k] is not None) == known
    if "p90" in known:
        assert wall["p90"] == pytest.approx(0.9 * n, rel=0.02)


def test_engine_time_is_summarised_where_there_is_some_and_taken_call_by_call(
    clock: Callable[..., Clock],
) -> None:
    told = iter([99.0, 0.5, 0.25, 0.75, 0.5])  # the first is of what ran before the block
    block = run_block(clock(steady(40.0)).run, cycle_inputs(PICTURES), 0.15, lambda: next(told))
    assert block.engine_ms == [0.5, 0.25, 0.75, 0.5]
    assert summarise_calls([block, block])["engine_ms"]["p50"] == 0.5
    assert summarise_calls([block, block])["engine_ms"]["n"] == 8
    assert summarise_calls([Block([1.0], [1.0])])["engine_ms"] is None


def made_blocks(seed: int, between: float) -> list[list[float]]:
    """20 blocks of 15 calls around 10 ms: 1 % of noise a call, `between` a block."""
    generator = np.random.default_rng(seed)
    level = 10 * (1 + between * generator.standard_normal((20, 1)))
    return (level * (1 + 0.01 * generator.standard_normal((20, 15)))).tolist()


def test_the_interval_of_the_median_is_that_of_pooled_calls_of_drawn_blocks() -> None:
    blocks = made_blocks(0, 0.02)
    generator = np.random.default_rng(1)
    drawn = [generator.integers(20, size=20) for _ in range(2000)]
    slow = [np.median(np.array(blocks)[rows]) for rows in drawn]
    assert median_interval(blocks) == pytest.approx(np.percentile(slow, [2.5, 97.5]), rel=2e-3)


def test_the_interval_of_the_median_holds_the_truth_nineteen_times_in_twenty() -> None:
    found = [median_interval(made_blocks(seed, 0.02)) for seed in range(100)]
    assert 85 <= sum(i is not None and i[0] <= 10 <= i[1] for i in found) <= 100


def test_blocks_that_differ_widen_the_interval_of_the_median_and_few_give_none() -> None:
    (a, b), (c, d) = (median_interval(made_blocks(0, s)) or [0, 0] for s in (0.0, 0.05))
    assert d - c > 4 * (b - a) > 0
    assert median_interval(made_blocks(0, 0.0)[:4]) is None
    assert median_interval(made_blocks(0, 0.0)) == [a, b]


def test_the_worst_of_several_verdicts() -> None:
    assert latency.worst_verdict(["PASS", "INCONCLUSIVE", "FAIL"]) == "FAIL"
    assert latency.worst_verdict(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert latency.worst_verdict(["PASS"]) == "PASS"


QUIET = {"stable": True, "threads": 1, "load": 1.0, "cores": 2}


@pytest.mark.parametrize(
    ("change", "cpu", "reasons"),
    [
        ({}, 1.0, []),
        ({}, 0.85, ["NOISY", "cpu/wall 0.85 below 0.9"]),
        ({"threads": 2}, 0.85, []),
        ({"threads": None}, 0.1, []),
        ({"load": 2.5}, 1.0, ["NOISY", "load 2.5 above 2 cores"]),
        ({"load": None}, 1.0, []),
        ({"stable": False}, 1.0, ["NOISY", "warm-up not stable"]),
        ({"throttled": 3}, 1.0, ["NOISY", "stopped 3 times by the CPU quota"]),
    ],
)
def test_a_disturbed_row_is_noisy_and_says_why(
    change: dict[str, object], cpu: float, reasons: list[str]
) -> None:
    assert row_flags(Block([1.0] * 10, [cpu] * 10), **{**QUIET, **change}) == reasons  # type: ignore[arg-type]


def test_schedule_is_seeded_and_runs_everyone_once_a_round() -> None:
    orders = schedule(5, 20, seed=1)
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len({tuple(order) for order in orders}) > 10
    assert orders == schedule(5, 20, seed=1) != schedule(5, 20, seed=2)


def rounds(ms: float, processes: tuple[float, ...], seed: int, drift: np.ndarray) -> list:
    """(processes, rounds) of CPU p50: each process its own factor, one drift for all, 1 % of noise."""
    generator = np.random.default_rng(seed)
    noise = 1 + 0.01 * generator.standard_normal((len(processes), len(drift)))
    return (ms * np.array(processes)[:, None] * drift * noise).tolist()


DRIFT = np.array([1, 1.5, 0.9, 2.0, 1.1, 1.4, 1.0, 1.7])  # a loaded box: rounds differ by 2x
ALIKE = (1.0, 1.01, 0.99)


@pytest.mark.parametrize(
    ("slower", "verdict"), [(1.0, "PASS"), (0.8, "PASS"), (1.2, "FAIL"), (1.06, "INCONCLUSIVE")]
)
def test_the_verdict_sees_through_drift(slower: float, verdict: str) -> None:
    a, b = (rounds(10 * f, ALIKE, seed, DRIFT) for f, seed in ((slower, 1), (1, 2)))
    ratio = cpu_ratio(a, b)
    assert ratio.verdict == verdict
    assert ratio.median == pytest.approx(slower, rel=0.02)
    assert ratio.ci_low <= ratio.median <= ratio.ci_high


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.9, 1.04, "PASS"),
        (0.9, 1.06, "INCONCLUSIVE"),
        (1.04, 1.2, "INCONCLUSIVE"),
        (1.06, 1.2, "FAIL"),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, verdict: str) -> None:
    assert latency.Ratio((low + high) / 2, low, high, 0.05).verdict == verdict


def test_processes_that_differ_widen_the_interval_that_rounds_alone_would_not() -> None:
    lottery = cpu_ratio(
        rounds(2, (1.0, 1.25, 1.26), 1, DRIFT), rounds(2, (1.0, 1.01, 1.24), 2, DRIFT)
    )
    alike = cpu_ratio(rounds(2, ALIKE, 1, DRIFT), rounds(2, ALIKE, 2, DRIFT))
    assert lottery.median > 1.1  # above the tolerance, by luck of the processes
    assert lottery.verdict == "INCONCLUSIVE"
    assert lottery.ci_high - lottery.ci_low > 5 * (alike.ci_high - alike.ci_low)


def test_tolerance_is_wider_for_a_net_below_5_ms() -> None:
    assert (
        cpu_ratio(rounds(4.5, ALIKE, 1, DRIFT / DRIFT), rounds(4.5, ALIKE, 2, DRIFT / DRIFT)).tol
        == 0.1
    )
    assert latency.tolerance(5.0) == 0.05


def test_one_process_a_side_is_paired_by_round() -> None:
    student, teacher = rounds(2, (1.0,), 1, DRIFT), rounds(8, (1.0,), 2, DRIFT)
    ratio = latency.paired_ratio(student, teacher)
    assert ratio.ci_low <= ratio.median <= ratio.ci_high
    assert ratio.median == pytest.approx(0.25, rel=0.02)
    assert ratio.ci_high - ratio.ci_low < 0.02  # the drift of the rounds, up to 2x, is gone


def test_the_same_numbers_give_the_same_interval() -> None:
    a, b = rounds(3, ALIKE, 1, DRIFT), rounds(3, ALIKE, 2, DRIFT)
    assert cpu_ratio(a, b, seed=4) == cpu_ratio(a, b, seed=4)


def test_latency_and_device_need_neither_torch_nor_a_runtime() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'openvino', 'PIL'): sys.modules[name] = None\n"
        "import exporters.bench.latency, pipeline.core.machine"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
