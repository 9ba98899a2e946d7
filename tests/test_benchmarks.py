"""The benchmarks' own tools: what they measure is what happens, and nothing is recorded of an uncommitted tree."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    apart,
    counters,
    cpu_model,
    end_to_end,
    h200,
    h200_ahead,
    launch,
    record,
    replay,
    table,
    warm,
    zoo,
)
from benchmarks.measure import interleaved_medians, peak_extra_memory
from einscade.codegen.schedule import Schedule
from einscade.ir.device import H200
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run
from einscade.runtime.candidates import candidates
from einscade.runtime.program import Program
from einscade.runtime.tuning import Timing

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/clear_refs is Linux's")


@linux
@pytest.mark.parametrize("mebibytes", [16, 96])
def test_peak_memory_of_a_temporary(mebibytes: int) -> None:
    """A tensor that is freed before the call returns counts, and so does it the second time."""
    call = lambda: float(torch.ones(mebibytes * 2**18).sum())  # noqa: E731
    call()
    for _ in range(2):
        assert abs(peak_extra_memory(call) / 2**20 - mebibytes) < 4


def test_calls_take_turns() -> None:
    order: list[str] = []
    medians = interleaved_medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert [len(times) for _, times in medians.values()] == [3, 3]
    with pytest.raises(ValueError, match="repeats=0"):
        interleaved_medians({}, repeats=0)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def git(*arguments: str) -> None:
        subprocess.run(("git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments), cwd=tmp_path, check=True)

    (tmp_path / "code.py").write_text("x = 1\n")
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-qm", "one")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "benchmarks" / "results")
    return tmp_path


def test_figures_are_recorded_under_their_commit(repository: Path) -> None:
    env = record.environment()
    path = record.write("some", {"ratio": 0.5}, env)
    kept = json.loads(path.read_text())
    assert kept["figures"] == {"ratio": 0.5}
    assert len(kept["environment"]["commit"]) == 40
    record.write("some", {"ratio": 0.4}, env)  # other results do not make the tree dirty


def test_a_dirty_tree_records_nothing(repository: Path) -> None:
    env = record.environment()
    (repository / "code.py").write_text("x = 2\n")
    with pytest.raises(record.DirtyTreeError, match=r"code\.py"):
        record.write("some", {}, env)
    assert not record.RESULTS.exists()


def test_figures_of_another_commit_are_not_recorded(repository: Path) -> None:
    with pytest.raises(record.DirtyTreeError, match="measure again"):
        record.write("some", {}, record.environment() | {"commit": "0" * 40})


def test_the_table_tells_what_is_missed() -> None:
    table = cpu_model._table({"import_s": 0.1, "cold_s": 21.0}).splitlines()
    assert table[1].endswith("ok")
    assert table[2].endswith("MISSED")


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        ({}, True),
        ({"found": 1}, False),
        ({"rewritten": 1}, False),
        ({"stray": 1}, False),
        ({"error": 2e-4}, False),
        ({"error": float("nan")}, False),
        ({"failed": "einscade: attention: the triton kernel failed"}, False),
        ({"gradient_error": 9e-5}, True),
        ({"gradient_error": 2e-4}, False),
        ({"gradient_error": float("inf")}, False),
        ({"gradient_error": 1.4e-2, "original_gradient_error": 1e-2}, True),
        ({"gradient_error": 1.6e-2, "original_gradient_error": 1e-2}, False),
        ({"error": 1.4e-2, "original_error": 1e-2}, True),
        ({"error": 1.6e-2, "original_error": 1e-2}, False),
        ({"error": float("inf"), "original_error": float("inf")}, False),
        ({"true": 0, "found": 0, "rewritten": 0}, True),
        ({"true": None}, False),
    ],
)
def test_a_row_of_the_zoo_holds_only_if_all_of_it_does(change: dict[str, float | None], ok: bool) -> None:
    good = {"true": 2, "found": 2, "rewritten": 2, "stray": 0, "error": 1e-6}
    assert zoo.Row("some", "eager", **(good | change)).ok is ok


def test_a_crash_or_a_hang_is_a_row_and_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, attention: str, how: zoo.How) -> zoo.Row:
        if name == "hangs":
            time.sleep(60)
        if name == "dies":
            os._exit(7)
        return zoo.Row(name, attention, note="done")

    monkeypatch.setattr(zoo, "run", run)
    jobs = [(name, "eager", zoo.How()) for name in ("hangs", "dies", "one", "two")]
    *quick, slow = zoo.run_all(jobs, timeout=5, at_once=2)
    notes = {row.family: row.note for row in quick}
    assert notes == {"dies": "the process died with exit code 7", "one": "done", "two": "done"}
    assert (slow.family, slow.note) == ("hangs", "no result within 5 s")


def test_nan_is_an_infinite_error() -> None:
    """Wherever it stands among the outputs."""
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    for actual in ([bad, good], [good, bad]):
        assert zoo._error([good, good], actual)[0] == float("inf")
        assert zoo._relative([good, good], actual) == float("inf")
        assert max(zoo._gradient_errors([good, None, good], [actual[0], None, actual[1]])) == float("inf")
    with pytest.raises(ValueError, match="returned 1 tensors"):
        zoo._error([good], [good, good])
    with pytest.raises(ValueError, match="another set of weights"):
        zoo._gradient_errors([good, None], [good, good])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_whole_models_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step and an encoder, small: both right, rewritten and timed."""
    names = ["llama3-8b-decode-32k", "t5-large-encoder-4k"]
    out = tmp_path / "figures.json"
    command = ["end_to_end", *names, "--tiny", "--variants", "eager", "einscade", "--out", str(out), "--commit", "none"]
    monkeypatch.setattr(sys, "argv", command)
    assert end_to_end.main() == 0
    figures = json.loads(out.read_text())["figures"]
    for name in names:
        ours = figures[name]["variants"]["einscade"]
        assert ours["rewritten"] == ours["sites"] == 2
        assert ours["ms"] > 0


@pytest.mark.slow
def test_whole_models_are_checked_in_other_processes() -> None:
    """Before the table is made; their errors come back."""
    name = "t5-large-encoder-4k"
    (found,) = end_to_end.checked_ahead([name], ["eager"], ["--tiny"]).items()
    assert found[0] == name
    assert 0 < found[1]["error"] <= 1.5 * found[1]["eager_bf16_error"]
    assert "problem" not in found[1]


def test_what_processes_apart_say(tmp_path: Path) -> None:
    """Of one that ends well, one that crashes and one that takes too long: what they said until then."""
    say = "import sys; print('lost'); log = open(sys.argv[-1], 'a'); log.write('[1]\\n'); log.flush(); "
    commands = [["-c", say + rest] for rest in ("log.write('2\\n')", "1 / 0", "import time; time.sleep(60)")]
    started = time.monotonic()
    assert apart.lines(commands, 3, 3) == [[[1], 2], [[1]], [[1]]]
    assert time.monotonic() - started < 30
    assert apart.lines(commands, 1, 0) == [[], [], []]


def test_lines_come_as_they_are_written() -> None:
    """Of processes that run at once, until the last of them ends, crashed or not; each with its own settings."""
    say = "import os, sys, time; log = open(sys.argv[-1], 'a'); "
    first = say + "log.write('[1, 2'); log.flush(); time.sleep(0.5); log.write(']\\n3\\n'); log.flush(); 1 / 0"
    second = say + "time.sleep(1); log.write(os.environ['SOME'] + '\\n')"
    assert list(apart.stream([["-c", first], ["-c", second]], [{}, {"SOME": "4"}])) == [[1, 2], 3, 4]
    forever = say + "log.write('1\\n'); log.flush(); time.sleep(60)"
    started = time.monotonic()
    assert next(apart.stream([["-c", forever]], [{}])) == 1
    assert time.monotonic() - started < 30


def test_what_one_claims_is_not_anothers(tmp_path: Path) -> None:
    assert apart.claim(tmp_path, "a:b")
    assert not apart.claim(tmp_path, "a:b")
    assert apart.claim(tmp_path, "a")


def test_a_gpu_of_those_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert apart.gpu(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert apart.gpu(1) == {"CUDA_VISIBLE_DEVICES": "5"}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_attention_rows_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every kind, small: right, rewritten, with figures for themselves and their peers."""
    names = "gqa-causal-d128,documents,differential,evoformer-rows,gqa-causal-d128-backward"
    out = tmp_path / "figures.json"
    command = ["h200", "--rows", names, "--peers", "fa4,compile", "--tiny", "--ahead", "0"]
    command += ["--out", str(out), "--commit", "none"]
    monkeypatch.setattr(sys, "argv", command)
    assert h200.main() == 0
    figures = json.loads(out.read_text())["figures"]
    assert list(figures) == names.split(",")
    for row in figures.values():
        assert row["error"] <= 1.5 * row["plain_error"]
        assert row["ms"] > 0
        assert len(row["kernels"]) == 1
        assert row["compile"] >= 0
        assert row["fa4"].startswith("no: ")  # it is not installed, or needs CUDA
        assert set(row["seconds"]) == {"einscade", "fa4", "compile"}
        (tuning,) = row["tuning"]
        several = tuning["candidates"] > 1  # where there is one there is nothing to measure
        assert len(tuning["measured"]) == tuning["candidates"]
        assert (tuning["untuned"] or 0) >= several
    assert json.loads(out.read_text())["tuning"] == h200.summary(figures)


def test_runs_of_one_commit_are_joined(tmp_path: Path) -> None:
    def run(name: str, commit: str, *rows: str) -> Path:
        env = {"commit": commit, "cpu": "", "gpu": "G", "python": "3", "versions": {}, "date": name}
        (tmp_path / name).write_text(json.dumps({"environment": env, "figures": {row: {"tflops": 1} for row in rows}}))
        return tmp_path / name

    backward, forward = run("b", "1", "dense-d64-backward"), run("f", "1", "causal-d64", "dense-d64")
    found = h200.joined([backward, forward])
    assert list(found["figures"]) == ["dense-d64", "causal-d64", "dense-d64-backward"]
    assert found["environment"]["commit"] == "1"
    assert found["tuning"]["untuned_median"] is None
    with pytest.raises(ValueError, match="another commit"):
        h200.joined([forward, run("o", "2", "documents")])
    with pytest.raises(ValueError, match="too: dense-d64"):
        h200.joined([forward, run("t", "1", "dense-d64")])


@pytest.mark.slow
def test_rows_are_measured_on_several_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checked ahead, then measured by one of two processes."""
    out = tmp_path / "figures.json"
    command = ["h200", "--rows", "sigmoid", "--peers", "cudnn", "--tiny", "--gpus", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--commit", "none"])
    assert h200.main() == 0
    run = json.loads(out.read_text())
    assert run["environment"]["gpus"] == 2
    assert run["seconds"]["all"] >= run["seconds"]["ahead"] >= 1
    ((name, row),) = run["figures"].items()
    assert name == "sigmoid"
    assert row["gpu"] in (0, 1)
    assert 0 < row["error"] <= 1.5 * row["plain_error"]
    assert row["bounds"]["goal"]["met"] is False
    assert "cuDNN: not in scaled_dot_product_attention (sigmoid)" in capsys.readouterr().out


def test_rows_come_in_order_and_crashes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second row comes first, the third not at all."""
    good = {"tflops": 1.0, "error": 0.1, "plain_error": 0.2, "kernels": [], "schedules": [], "fa4": "TimeoutError: no"}
    monkeypatch.setattr(h200, "measured_apart", lambda plan: iter([("causal-d128", good), ("dense-d128", good)]))
    out = tmp_path / "figures.json"
    command = ["h200", "--rows", "causal-d64,causal-d128,dense-d128", "--tiny", "--gpus", "2", "--ahead", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out), "--commit", "none"])
    assert h200.main() == 1
    kept = json.loads(out.read_text())["figures"]
    assert list(kept) == ["dense-d128", "causal-d128", "causal-d64"]
    assert "crashed" in kept["causal-d64"]["problem"]
    printed = capsys.readouterr().out
    assert printed.index("| dense-d128") < printed.index("| causal-d128") < printed.index("| causal-d64")
    assert "einscade: the process that measured it crashed (causal-d64)" in printed
    assert "FlashAttention-4: TimeoutError: no (dense-d128, causal-d128)" in printed


@pytest.mark.slow
def test_what_is_done_ahead() -> None:
    """Gradients first, slow compilers first, FlexAttention last where libraries compute the same. What a peer cannot
    compute is known afterwards; what there was no time to begin is not."""
    rows = [row for row in h200.ROWS if row.name in ("window-1024", "documents-backward")]
    todo = h200_ahead.jobs(rows, ["cudnn", "fa4", "flex"])
    names = ["documents-backward", "window-1024"]
    assert todo == [(name, what) for what in ("fa4", "flex", "check") for name in names]
    every = [name for name, what in h200_ahead.jobs(h200.ROWS, ["flex"]) if what == "flex"]
    assert every.index("causal-d64-backward") > every.index("evoformer-rows") > every.index("window-1024-backward")
    calls = [job for job in todo if job[1] == "fa4"]
    found = h200_ahead.ahead(calls, 0, 240, tiny=True)
    assert found == {name: {"fa4": "no: flash-attn-4 is not installed"} for name in names}
    assert h200_ahead.ahead(calls, 0, 0) == {}


def test_what_was_begun_ahead_and_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a peer there is a reason why it has no figure; a check is made again."""
    said = [[["a", "fa4", None], ["a", "flex", "begun"]], [["b", "check", "begun"], ["a", "check", {"error": 1.0}]]]
    monkeypatch.setattr(apart, "lines", lambda *_: said)
    todo = [("a", "fa4"), ("a", "flex"), ("a", "check"), ("b", "check")]
    found = h200_ahead.ahead(todo, 2, 7)
    reason = "its first call crashed, or took longer than 7 s"
    assert found == {"a": {"fa4": None, "flex": reason, "check": {"error": 1.0}}, "b": {}}


def test_bounds_beside_peers() -> None:
    """Those that could be measured, each met or missed."""
    rows = {r.name: r for r in h200.ROWS}
    assert rows["dense-d64"].bounds({"tflops": 540.0}) == {"goal": {"tflops": 540, "met": True}}
    assert rows["gqa-causal-d128-backward"].bounds({"tflops": 1.0}) == {}
    windows = rows["window-1024-backward"]
    found = windows.bounds({"tflops": 380.0, "flex": 300.0, "fa4": 411.0})
    assert found == {"flex": {"tflops": 375.0, "met": True}, "fa4": {"tflops": 411.0, "met": False}}
    found = windows.bounds({"tflops": 380.0, "flex": 300.0, "fa4": "no: not installed"})
    assert found["fa4"] == {"tflops": None, "met": None}
    assert windows.bounds({"problem": "x", "flex": 300.0})["flex"] == {"tflops": 375.0, "met": None}


def test_a_row_of_the_table() -> None:
    """Bold where everything is reached that could be measured."""
    rows = {r.name: r for r in h200.ROWS}
    windows, work = rows["window-1024-backward"], "window-1024-backward, B2 H16 N8192 D128"
    figures = {"tflops": 380.0, "flex": 300.0, "fa4": 411.0, "compile": "no: memory", "cudnn": "no: not in it"}
    bounds = "375 (1.25 × FlexAttention), 411 (FlashAttention-4)"
    assert table.line(windows, figures) == f"| {work} | 380 | {bounds} | 0.92 × | – | 300 | 411 | – |"
    assert table.line(windows, figures | {"fa4": 379.9}, "more").startswith(f"| {work} | **380** | 375 ")
    missing = "– (1.25 × FlexAttention), – (FlashAttention-4)"
    assert table.line(windows, {"tflops": 380.0}) == f"| {work} | 380 | {missing} | – | – | – | – | – |"
    assert table.line(rows["gqa-causal-d128"], {}).startswith("| gqa-causal-d128, B2 H32/8 N16384 D128 | – | 650 | – |")
    assert table.line(rows["evoformer-rows"], {}).startswith("| evoformer-rows, B256 H4 N256 D64 |")
    assert len(table.header().splitlines()[0].split("|")) == len(table.line(windows, figures).split("|"))
    reasons = table.reasons({"a": figures, "b": {"problem": "E: x", "compile": "no: memory"}}, ["compile", "flex"])
    assert reasons == ["torch.compile: memory (a, b)", "einscade: E: x (b)"]


def test_the_documents_show_the_run_that_is_kept() -> None:
    """`python benchmarks/table.py --write` after a run."""
    run = json.loads((record.RESULTS / "h200.json").read_text())
    for name in table.FILES:
        text = (record.ROOT / name).read_text()
        assert table.filled(text, run) == text
    with pytest.raises(ValueError, match="no block"):
        table.filled("none", run)


def test_what_tuning_was_for() -> None:
    slow, fast = Schedule((("p", 64),), resident=132), Schedule((("p", 128),))
    timings = (
        Timing(0, "gluon", slow, 3e-3), Timing(2, "gluon", fast, 2e-3), Timing(5, "library:sdpa", Schedule(), 5e-3),
    )  # fmt: skip
    kernel = SimpleNamespace(timings=timings, untried=3, spent=(4.04, 1.0), candidate="gluon", schedule=fast)
    found = h200.tuning(kernel)
    measured = found.pop("measured")
    assert found == {"compile_s": 4.0, "measure_s": 1.0, "candidates": 6, "untuned": 1.5, "library": 2.5}
    assert measured[0] == {"rank": 0, "kind": "gluon", "ms": 3.0, "p": 64, "resident": 132}
    untuned = h200.tuning(SimpleNamespace(timings=(), untried=0, spent=(0.0, 0.0), candidate="gluon", schedule=fast))
    results = {"a": {"tuning": [found | {"measured": measured}]}, "b": {"tuning": [untuned]}, "c": {"problem": "none"}}
    assert h200.summary(results) == {"untuned_median": 1.5, "untuned_worst": 1.5, "tuning_s_most": 5.0}


def test_replaying_recorded_times() -> None:
    """The first of the model's present order that was measured, against the best of all that was."""
    program = Program("exact", parse_cascade(launch.ATTENTION))
    sizes = {"B": 4, "M": 4096, "P": 4096}
    found = candidates(program, run(program.cascade, "exact").cascade, (), H200, sizes)
    assert len([c for c in found if c.kind == "gluon"]) >= 3
    ms = [None, 1.2, 1.0, *[3.0] * (len(found) - 3)]
    measured = [
        {"rank": i, "kind": c.kind, "ms": x} | h200.schedule_record(c.schedule)
        for i, (c, x) in enumerate(zip(found, ms, strict=True))
        if x is not None
    ]
    gone = {"rank": 99, "kind": "gluon", "ms": 0.8, "p": 7}  # measured once, no candidate any more
    row = {"programs": [{"text": program.text, "sizes": sizes}], "tuning": [{"measured": [*measured, gone]}]}
    assert replay.ratios(json.loads(json.dumps(row)), H200) == pytest.approx([1.5])
    assert replay.ratios({"programs": row["programs"], "tuning": [{"measured": []}]}, H200) == []
    assert replay.device_of({"gpu": "NVIDIA H200"}) is H200
    with pytest.raises(ValueError, match="does not describe"):
        replay.device_of({"gpu": None})


@pytest.mark.slow
def test_the_models_choice_is_near_the_best_that_was_measured() -> None:
    """What runs under EINSCADE_AUTOTUNE=0 takes at most 1.15 of the best candidate's time, as the median of rows: with
    today's order of candidates, and the times that a GPU had for them."""
    kept = json.loads((record.RESULTS / "h200-tuning.json").read_text())
    device = replay.device_of(kept["environment"])
    found = [ratio for row in kept["figures"].values() for ratio in replay.ratios(row, device)]
    assert len(found) >= 8
    assert statistics.median(found) <= 1.15


@pytest.mark.slow
def test_a_warm_process_compiles_nothing(tmp_path: Path) -> None:
    """Kernels for Hopper, compiled by one process for a GPU that is not there, and found by the next one."""
    pytest.importorskip("triton")
    cold, warmed = (warm.apart(["causal-d128"], str(tmp_path)) for _ in range(2))
    assert cold["compiled"] >= 1
    assert warmed["compiled"] == warmed["tuned"] == 0
    assert list(warmed["seconds"]) == ["causal-d128"]


@pytest.mark.parametrize(
    ("argument", "message"), [("--rows=dense", "unknown row dense"), ("--peers=cudn", "unknown peer cudn")]
)
def test_unknown_rows_and_peers(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["h200", argument, "--tiny"])
    with pytest.raises(SystemExit):
        h200.main()
    assert message in capsys.readouterr().err


def test_operations_count_the_points_that_are_kept() -> None:
    rows = {r.name: r for r in h200.ROWS}
    for name, kept in [("dense-d64", 64 * 64), ("causal-d64", 64 * 65 // 2), ("window-1024", 64 * 65 // 2)]:
        row = rows[name]
        found = row.operations(64, row.inputs(64, "cpu", batch=1))
        assert found == 4 * kept * row.width * row.heads * (row.batch or 0)


def test_counters_of_a_kernel() -> None:
    """Names, units' row, thousands and missing values as Nsight Compute prints them; the longest waits come first."""
    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    names = ["ID", "Kernel Name", "gpu__time_duration.sum", "launch__registers_per_thread", counters.PERCENTAGES["L2"]]
    names += [counters.OTHERS["conflicts"], *(stall.format(x) for x in ("wait", "gmma", "selected"))]
    table = [names, ["", "", "ns", "register/thread", "%", "", "inst", "inst", "inst"]]
    table += [["0", "list_tiles", "8,512", "32", "n/a", "2,500,000", "1.5", "2.25", "9"]]
    text = "==PROF== Connected to process 1\n" + "\n".join(",".join(f'"{x}"' for x in row) for row in table)
    (found,) = counters.counters(text)
    assert (found["kernel"], found["ncu_us"], found["registers"], found["L2"]) == ("list_tiles", 8.512, 32.0, None)
    assert found["conflicts"] == 2.5
    assert list(found["stalls"].items()) == [("gmma", 2.25), ("wait", 1.5)]
    with pytest.raises(counters.ProfilingError, match="no kernel"):
        counters.counters("==WARNING== No kernels were profiled.")
