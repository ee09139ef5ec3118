"""How a step is computed changes its speed, not its meaning: parts, ranks, averages, formats, launchers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.core import cli, config
from pipeline.core.errors import UserError
from pipeline.distill.methods.table import METHODS
from pipeline.distill.trainer import build, train_step
from pipeline.models.checkpoint import load
from pipeline.training import compute, loop, stopwatch
from pipeline.training import ranks as training_ranks
from pipeline.training.compute import Compute
from pipeline.training.ranks import SINGLE_PROCESS, Ranks, average_figures, average_gradients
from tests import command_line
from tests.conftest import ROOT
from tests.test_training import QUICK, run

# LayerNorm only: batch norm would take its statistics from each part by itself.
UNNORMED = replace(QUICK, student="test_convnext", student_kwargs={"output_stride": 8})


def steps(trainer, count):
    timer = stopwatch.Stopwatch()
    figures = [train_step(trainer, step, timer) for step in range(count)]
    return [average_figures({k: float(v) for k, v in f.items()}, trainer.ranks) for f in figures]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.student.parameters()])


@pytest.mark.parametrize(
    ("parts", "count", "share"),
    [(2, 4, 0.5), (4, 3, 0.3), pytest.param(4, 10, 0.5, marks=pytest.mark.ci)],
)
def test_a_batch_in_parts_is_the_batch(
    parts, count, share, prepared, teacher_path, features, monkeypatch
):
    """A share of 0.3 leaves 45 cached views, which four parts hold unevenly."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda g, lr, **_: torch.optim.SGD(g, lr))
    trained = []
    for accumulate in (1, parts):
        config = replace(UNNORMED, labelled_share=share, compute=Compute(accumulate=accumulate))
        trainer = build(config, "cakd+logits", prepared, teacher_path, features)
        trained.append((steps(trainer, count), weights(trainer)))
    (whole, ours), (split, theirs) = trained
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for a, b in zip(whole, split, strict=True):
        for name in ("cross_entropy", "logits", "attention", "gram", "tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


RANKS = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from pipeline.data.prepared import Prepared
from pipeline.distill.trainer import build
from pipeline.training.ranks import ranks
from tests.test_compute import UNNORMED, steps, weights

torch.optim.AdamW = lambda groups, lr, **_: torch.optim.SGD(groups, lr)
prepared, teacher, features, out = map(Path, sys.argv[1:])
with ranks() as joined:
    trainer = build(
        UNNORMED, "cakd+logits", Prepared.open(prepared), teacher, features, ranks=joined
    )
    figures = steps(trainer, 50)
    save_file({"weights": weights(trainer)}, out / f"{joined.rank}.safetensors")
    (out / f"{joined.rank}.json").write_text(json.dumps(figures))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork: test-ci")
def test_two_forked_ranks_are_one_process_with_the_whole_batch(
    prepared, teacher_path, features, tmp_path, monkeypatch
):
    """A few steps; with torchrun, and fifty of them, below."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda g, lr, **_: torch.optim.SGD(g, lr))

    def trained(among):
        trainer = build(UNNORMED, "cakd+logits", prepared, teacher_path, features, ranks=among)
        return steps(trainer, 3), weights(trainer)

    figures, one = trained(SINGLE_PROCESS)
    (theirs, first), (_, second) = forked(2, trained, tmp_path)
    assert torch.equal(first, second)
    assert ((first - one).norm() / one.norm()).item() <= 1e-5
    for a, b in zip(figures, theirs, strict=True):
        for name in ("cross_entropy", "logits", "attention", "tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork: test-ci")
@pytest.mark.parametrize("method", ["queue", "crd"])
def test_what_ranks_gather_may_be_of_two_lengths(
    method, prepared, teacher_path, features, tmp_path
):
    """45 cached views on two ranks: 22 and 23, in one queue and one memory."""
    config = replace(UNNORMED, labelled_share=0.3)

    def trained(among):
        trainer = build(config, method, prepared, teacher_path, features, ranks=among)
        figures = steps(trainer, 2)
        return figures, {k: v.clone() for k, v in trainer.objective.named_buffers()}

    (_, alone) = trained(SINGLE_PROCESS)
    (figures, first), (_, second) = forked(2, trained, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert figures[0][method] > 0
    if method == "queue":
        name = "loss_terms.queue.position"
        assert first[name] == alone[name] == 90

    def gathered(among):
        return training_ranks.of_all_ranks(torch.full((among.rank + 1, 3), among.rank))

    for everything in forked(2, gathered, tmp_path):
        assert everything.tolist() == [[0] * 3, [1] * 3, [1] * 3]


def forked(count, work, folder):
    """`work(ranks)` in forked processes, joined as torchrun would join them; what each returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [fork(rank, count, port, work, folder) for rank in range(count)]
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [0] * count
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def fork(rank, count, port, work, folder):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # OpenMP's other threads are not here
        names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        with training_ranks.ranks() as among:
            torch.save(work(among), folder / f"{rank}.pt")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.mark.ci
def test_two_ranks_are_one_process_with_the_whole_batch(digits, teacher_path, features, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    found, figures = [], []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        out.mkdir()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [*launcher, str(script), *map(str, (digits, teacher_path, features, out))],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append([load_file(p)["weights"] for p in sorted(out.glob("*.safetensors"))])
        figures.append(json.loads((out / "0.json").read_text()))
    (one,), (first, second) = found
    assert torch.equal(first, second)
    assert ((first - one).norm() / one.norm()).item() <= 1e-5
    for a, b in zip(*figures, strict=True):
        for name in ("cross_entropy", "logits", "attention", "tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_averaged_weights_are_what_is_published(prepared, teacher_path, features, tmp_path):
    for decay in (0.0, 0.9):
        config = replace(QUICK, compute=Compute(ema=decay))
        run(config, "logits", prepared, teacher_path, features, tmp_path / str(decay))
    students = [
        load(tmp_path / name / "logits" / "student.safetensors")[0] for name in ("0.0", "0.9")
    ]
    plain, averaged = (dict(s.named_parameters()) for s in students)
    assert set(plain) == set(averaged)
    assert not torch.equal(plain["fc.weight"], averaged["fc.weight"])
    trainer = build(
        replace(QUICK, compute=Compute(ema=0.9)), "logits", prepared, teacher_path, features
    )
    expected = None
    for step in range(21):
        train_step(trainer, step, stopwatch.Stopwatch())
        now = trainer.student.fc.weight.detach().clone()
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    torch.testing.assert_close(averaged["fc.weight"].detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "how", [Compute(channels_last=True), Compute(precision="bf16"), Compute(compile=True)], ids=str
)
def test_formats_and_compilers_change_the_losses_by_rounding_only(
    how, prepared, teacher_path, features, monkeypatch
):
    if how.compile:  # the tracing and the hooks are what is ours; a C++ compiler need not be here
        exact = torch.compile
        monkeypatch.setattr(torch, "compile", lambda m: exact(m, backend="aot_eager"))
    first = []
    for compute_ in (Compute(), how):
        config = replace(QUICK, compute=compute_)
        first.append(steps(build(config, "cakd+logits", prepared, teacher_path, features), 2))
    tolerance = 0.05 if how.precision == "bf16" else 1e-3
    for name in ("cross_entropy", "logits", "attention", "gram", "tokens"):
        assert first[0][0][name] == pytest.approx(first[1][0][name], rel=tolerance), name
        assert first[1][1][name] > 0


@pytest.mark.ci
@pytest.mark.parametrize("method", sorted({*METHODS} - {"plain", "control", "trans", "robust"}))
def test_every_term_compiles_once_and_for_all_steps(
    method, prepared, teacher_path, features, monkeypatch
):
    """The step's number and its random keys must not make it anew; CRD's draws break its graph into parts."""
    first = steps(build(QUICK, method, prepared, teacher_path, features), 6)
    torch._dynamo.reset()
    graphs, exact = [], torch.compile

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda module: exact(module, backend=counted))
    config = replace(QUICK, compute=Compute(compile=True))
    trainer = build(config, method, prepared, teacher_path, features)
    names = {*trainer.objective.state_dict()}
    compiled = steps(trainer, 3)
    soon = len(graphs)
    compiled += [train_step(trainer, step, stopwatch.Stopwatch()) for step in range(3, 6)]
    assert len(graphs) == soon <= (20 if method == "crd" else 12)
    assert {*trainer.objective.state_dict()} == names
    for a, b in zip(first, compiled, strict=True):
        assert {k: float(v) for k, v in b.items()} == pytest.approx(
            {k: float(v) for k, v in a.items()}, rel=1e-4, abs=1e-6
        )


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers(prepared, teacher_path, features):
    config = replace(QUICK, compute=Compute(accumulate=3))
    with pytest.raises(
        UserError, match="got 64 for 1 ranks x 3 micro-batches .*; expected a multiple"
    ):
        build(config, "plain", prepared, teacher_path, features)
    with pytest.raises(UserError, match="got 4 for 2 ranks x 2 micro-batches"):
        Compute(accumulate=2).micro_batches(4, Ranks(0, 2))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cuda_graphs_are_of_the_student_and_a_step_is_marked_before_its_parts(
    accumulate, prepared, teacher_path, features, monkeypatch
):
    """On a CPU, with the compiler's call and the mark recorded; the graphs themselves need a GPU."""
    config = replace(QUICK, compute=Compute(accumulate=accumulate))
    plain = build(config, "cakd+logits", prepared, teacher_path, features)
    expected = steps(plain, 3)
    calls, exact = [], Compute.compiled
    graphs = replace(config, compute=replace(config.compute, compile="cuda-graphs"))

    def compile_(network, **options):
        def forward(inputs):
            calls.append("forward")
            return network(inputs)

        calls.append(options)
        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: calls.append("step"))
    monkeypatch.setattr(
        Compute, "compiled", lambda self, m, _: exact(self, m, torch.device("cuda"))
    )
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: calls.append(type(self).__name__))
    trainer = build(graphs, "cakd+logits", prepared, teacher_path, features)
    assert {"mode": "reduce-overhead"} in calls
    assert {"Pca", "Gl", "Logits"} <= {c for c in calls if isinstance(c, str)}
    calls.clear()
    assert steps(trainer, 3) == expected
    assert calls == 3 * ["step", *accumulate * ["forward"]]


def test_what_is_kept_of_a_step_lies_outside_its_graphs(
    prepared, teacher_path, features, monkeypatch
):
    """The next step's graphs overwrite what these returned; the logged losses must not change with it."""
    trainer = build(QUICK, "cakd+logits", prepared, teacher_path, features)
    exact, returned = trainer.reader._forward, []

    def overwritten(inputs):
        with torch.no_grad():
            for logits in returned:
                logits.fill_(torch.nan)
        returned.append(exact(inputs))
        return returned[-1]

    monkeypatch.setattr(trainer.reader, "_forward", overwritten)
    timer = stopwatch.Stopwatch()
    figures = [train_step(trainer, step, timer) for step in range(3)]
    assert all(v == v for step in figures for v in map(float, step.values()))


@pytest.mark.parametrize("how", [False, True, "cuda-graphs"])
def test_cuda_graphs_without_a_cuda_device_are_refused(how, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda m, **_: m)
    network, settings = torch.nn.Identity(), config.parse(Compute, {"compile": how}, "compute")
    if how != "cuda-graphs":
        assert settings.compiled(network, torch.device("cpu")) is network
        return
    with pytest.raises(
        UserError,
        match="compile: got 'cuda-graphs' on a cpu; expected true or false .*; set it to true",
    ):
        settings.compiled(network, torch.device("cpu"))


def test_another_kind_of_compiling_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="compute.compile: got 'graphs'; expected .*cuda-graphs"):
        config.parse(Compute, {"compile": "graphs"}, "compute")


@pytest.mark.parametrize(
    ("setting", "device", "precision", "groups", "on"),
    [
        ("auto", "cpu", "fp32", 1, False),
        ("auto", "cpu", "bf16", 1, False),
        ("auto", "cpu", "fp32", 8, True),
        ("auto", "cuda", "fp32", 8, False),
        ("auto", "cuda", "bf16", 1, True),
        (True, "cpu", "fp32", 1, True),
        (False, "cpu", "fp32", 8, False),
        (False, "cuda", "bf16", 8, False),
    ],
)
def test_the_memory_format_is_the_faster_one_or_the_one_set(setting, device, precision, groups, on):
    how = config.parse(Compute, {"channels_last": setting, "precision": precision}, "compute")
    network = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 8, 3, groups=groups))
    expected = torch.channels_last if on else torch.preserve_format
    assert how.memory_format(network, torch.device(device)) == expected
    assert Compute().channels_last == "auto"


def test_cuda_where_there_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match="got 'cuda'; expected a CUDA device, PyTorch sees none; set it to auto"
    ):
        compute.pick_device("cuda", "cache.device", SINGLE_PROCESS)
    assert compute.pick_device("auto", "cache.device", SINGLE_PROCESS).type == "cpu"
    assert Compute(device="cuda").backend() == "gloo"


@pytest.mark.parametrize(("field", "value"), [("accumulate", 0), ("ema", 1.0)])
def test_impossible_ways_to_compute_are_refused_with_the_value(field, value):
    with pytest.raises(UserError, match=f"compute.{field}: got {value}; expected"):
        config.parse(Compute, {field: value}, "compute")


def test_a_launched_stage_becomes_its_launcher_and_an_unknown_one_is_told(monkeypatch):
    """What the next test shows with real processes."""
    became = []
    monkeypatch.setattr(
        os, "execvp", lambda *given: became.append((given, os.environ[cli.LAUNCHED]))
    )
    argv = ("stages.distill", "a", "b", "c", "d", "e", "--method", "plain")
    command_line.here(*argv, **{cli.LAUNCH: "torchrun --nodes 2"})
    line = ["torchrun", "--nodes", "2", "-m", *argv]
    assert became == [(("torchrun", line), "1")]
    monkeypatch.undo()
    done = command_line.here(*argv, **{cli.LAUNCH: "no-such-launcher"})
    assert done.returncode == 2 and "CAKD_LAUNCH: got 'no-such-launcher'" in done.stderr


@pytest.mark.ci
def test_the_launcher_of_the_environment_gets_the_same_command_line(tmp_path):
    spy = tmp_path / "launcher"
    spy.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ['CAKD_LAUNCHED']]))\n"
    )
    spy.chmod(0o755)
    command = [sys.executable, "-m", "stages.distill", "a", "b", "c", "d", "e", "--method", "plain"]
    env = {**os.environ, cli.LAUNCH: f"{spy} --nodes 2"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert json.loads(done.stdout) == [["--nodes", "2", "-m", "stages.distill", *command[3:]], "1"]
    env[cli.LAUNCH] = "no-such-launcher"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "CAKD_LAUNCH: got 'no-such-launcher'" in done.stderr


def test_under_srun_the_ranks_are_slurms(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    slurm = {"STEP_ID": "0", "PROCID": "3", "NTASKS": "4", "LOCALID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with (
        pytest.raises(UserError, match="MASTER_ADDR: got no value under srun"),
        training_ranks.ranks(),
    ):
        pass
    assert os.environ.pop("RANK") == "3" and os.environ.pop("LOCAL_RANK") == "1"
    assert os.environ.pop("WORLD_SIZE") == "4"


@pytest.mark.parametrize("method", ["rkd", "irg", "crd", "rsd"])
def test_under_autocast_the_losses_are_computed_in_float32(
    method, prepared, teacher_path, features
):
    config = replace(QUICK, compute=Compute(precision="bf16"))
    trainer = build(config, method, prepared, teacher_path, features)
    seen = []

    def look(_, args):
        seen.append(
            (args[0].embedding.dtype, args[0].logits.dtype, torch.is_autocast_enabled("cpu"))
        )

    trainer.objective.loss_terms[method].register_forward_pre_hook(look)
    figures = train_step(trainer, 0, stopwatch.Stopwatch())
    assert seen == [(torch.float32, torch.float32, False)]
    assert all(value == value for value in figures.values())


STOPPED = """
import os, signal, sys, torch
from pathlib import Path
from torch import distributed, nn
from pipeline.core import cli, progress
from pipeline.training import loop
from pipeline.training.ranks import ranks

def main(_):
    with ranks() as joined:
        net = nn.Linear(2, 2)
        def step(i):
            if i == 5 and joined.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)  # the rank that saves nothing
            return {"loss": float(i)}
        tell = progress.Progress("distill", 100, quiet=joined.rank > 0)
        adam = torch.optim.Adam(net.parameters())
        loop.run_steps(
            tell, 1000, Path(sys.argv[1]), {"net": net}, {"adam": adam}, step, joined
        )

import argparse
cli.run(main, argparse.ArgumentParser(), [])
"""


@pytest.mark.ci
def test_a_signal_to_one_rank_makes_all_of_them_save_and_leave_after_the_same_step(tmp_path):
    script, checkpoint = tmp_path / "stopped.py", tmp_path / "c.safetensors"
    script.write_text(STOPPED)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *(str(script), str(checkpoint)),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.count("run again to resume") == 1 and "another rank" not in done.stderr
    with safe_open(checkpoint, framework="pt") as file:
        assert file.metadata()["step"] == str(loop.LOG_STEPS)


def test_gradients_of_one_rank_stay_as_they_are():
    leaf = torch.ones(3, requires_grad=True)
    leaf.sum().backward()
    average_gradients([leaf], SINGLE_PROCESS)
    assert leaf.grad.tolist() == [1, 1, 1]
