"""The zoo: is every attention of transformers' architectures found, rewritten and still right?

    python benchmarks/zoo.py                     every family of FAMILIES, eager and sdpa attention
    python benchmarks/zoo.py llama deberta-v2    these; any other model type of transformers works too
    python benchmarks/zoo.py --dynamic           compiled for lengths that move, and compared at two lengths
    python benchmarks/zoo.py --gradients         called for training: the gradients of all weights are compared as well
    python benchmarks/zoo.py --wide              with heads as wide and sequences as long as kernels are made for
    python benchmarks/zoo.py --device cuda --dtype bfloat16
    python benchmarks/zoo.py --json              the same as JSON; --markdown: the table of the README
    python benchmarks/zoo.py --write             keeps the rows in benchmarks/results/zoo.json (only of a clean commit)

Comes in: names of model types. Goes out: one row for each family and attention implementation: the true number of
attention sites, how many einscade found and rewrote, the largest error against the original in fp32, graph breaks and
compile seconds. The exit status is 1 if any site was missed, left alone or wrong.

The true number is counted without einscade and without a graph, from the operations that the original executes:
softmaxes of scores that reach the output (attention_calls.py says how they are told). A shared layer counts as often
as it is called; a router's softmax does not count. `rewritten` is how many of these softmaxes no longer run, seen by
torch's profiler in a call of the optimised model; `found` adds the sites that the report says were left unchanged.
A site elsewhere is `linear` if its module runs a linear form of attention (scores that are used without a softmax;
these are rewritten and compared as well), or else a stray: a router, a gate or an expert that should have been left
alone.

In half precision (`--dtype`) the error is relative to the norm of what the model gives in fp32 with the same weights,
and held against the error of the original in that precision.

The models have random weights (tiny_models.py). Every row is made in a process of its own, `--jobs` at a time.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch.utils import _pytree as pytree

import einscade
from benchmarks import record
from benchmarks.attention_calls import softmaxes_left, watch
from benchmarks.tiny_models import CannotShrink, Lengths, Tiny, has_sdpa, tiny

MAX_ERROR = 1e-4
MAX_RATIO = 1.5  # in half precision, over the original's error
ATTENTION = ("eager", "sdpa")
DTYPES = ("float32", "bfloat16", "float16")
NO_SDPA = "transformers has no sdpa for it"
OTHER_LENGTHS = Lengths(target=52, source=61)

# Those that einscade was developed with.
DEVELOPED = (
    "bert", "roberta", "distilbert", "albert", "gpt2", "gptj", "gpt_neox", "opt", "bloom", "mpt", "llama", "mistral",
    "mixtral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "t5", "bart", "m2m_100", "whisper", "vit", "dinov2",
    "clip", "swin", "deberta-v2", "xlnet", "longformer", "deepseek_v3", "gpt_oss", "minimax",
)  # fmt: skip
# Those that it met as they are; what they showed to be missing was then added for all.
HELD_OUT = (
    "electra", "mobilebert", "big_bird", "led", "pegasus", "marian", "blenderbot", "mbart", "wav2vec2", "hubert",
    "deit", "beit", "segformer", "siglip", "cohere", "olmo2", "stablelm", "starcoder2", "falcon", "persimmon",
    "granite", "glm", "nemotron", "phimoe", "jamba", "esm", "roformer", "convbert", "nystromformer", "lxmert", "vilt",
    "layoutlm", "dpt", "imagegpt", "codegen", "ctrl", "gpt_bigcode", "openai-gpt", "xlm", "flaubert", "biogpt", "fsmt",
    "prophetnet", "rembert", "tapas", "timesformer", "vivit", "qwen2_moe", "qwen3_next", "granitemoe", "smollm3",
    "ernie4_5", "exaone4", "helium", "olmoe", "arcee", "apertus", "falcon_h1", "git", "blip", "clipseg", "groupvit",
    "sam_vision_model", "bigbird_pegasus", "canine", "cvt", "data2vec-audio", "deberta", "diffllama", "doge",
    "eurobert", "gemma", "glm4_moe", "gpt_neo", "hiera", "ibert", "jetmoe", "layoutlmv3", "lilt", "llama4_text",
    "longt5", "luke", "modernbert", "moonshine", "mpnet", "mvp", "nllb-moe", "owlvit", "pegasus_x", "phi", "pixtral",
    "pvt_v2", "qwen3_moe", "sew-d", "speech_to_text", "squeezebert", "switch_transformers", "t5gemma", "umt5",
    "videomae", "wavlm", "xglm",
)  # fmt: skip
FAMILIES = DEVELOPED + HELD_OUT


@dataclass
class Row:
    """One family with one attention implementation. `error` is the largest absolute one; None where nothing ran.
    `failed`: what was raised, and what einscade warned of: a kernel or a pass that broke."""

    family: str
    attention: str
    true: int | None = None
    found: int | None = None
    rewritten: int | None = None
    stray: int | None = None
    linear: int | None = None
    error: float | None = None
    scale: float | None = None
    graph_breaks: int | None = None
    compile_s: float | None = None
    original_error: float | None = None
    gradient_error: float | None = None
    original_gradient_error: float | None = None
    failed: str = ""
    note: str = ""

    @property
    def applies(self) -> bool:
        return self.note != NO_SDPA

    @property
    def ok(self) -> bool:
        return not self.applies or (
            not self.failed
            and self.true is not None
            and self.true == self.found == self.rewritten
            and self.stray == 0
            and self.error is not None
            and math.isfinite(self.error)
            and self.error <= _bound(self.original_error)
            and (self.gradient_error or 0.0) <= _bound(self.original_gradient_error)
        )


def _bound(original: float | None) -> float:
    """On an error: in half precision, where the original's is known, by that."""
    return MAX_ERROR if original is None else MAX_RATIO * original


@dataclass(frozen=True)
class How:
    """What every row is run with: what compiles the rest of the graph, whether lengths move, whether gradients are
    compared, where and in what the model runs, and whether
    its heads are as wide as real ones."""

    inner: str = "eager"
    dynamic: bool = False
    gradients: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    wide: bool = False


# -- one row ----------------------------------------------------------------------------------------------------------


def run(name: str, attention: str, how: How = How()) -> Row:
    """Builds, counts, optimises, compares. What fails becomes the row's note."""
    row = Row(name, attention)
    try:
        if attention == "sdpa" and not has_sdpa(name):
            return Row(name, attention, note=NO_SDPA)
        made = tiny(name, attention, how.wide)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                _compare(row, made, how)
            finally:
                said = (str(w.message) for w in told if w.category is RuntimeWarning)
                row.failed = "; ".join(dict.fromkeys(x for x in said if x.startswith("einscade")))
    except Exception as error:
        row.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        row.failed = "; ".join(filter(None, (row.note, row.failed)))
        if os.environ.get("ZOO_TRACEBACK"):
            traceback.print_exc()
    return row


def _compare(row: Row, made: Tiny, how: How) -> None:
    dtype = getattr(torch, how.dtype)
    model = made.model.to(how.device, dtype)

    def inputs(lengths: Lengths | None = None) -> dict[str, Any]:
        found = made.inputs() if lengths is None else made.inputs(lengths)
        return pytree.tree_map_only(torch.Tensor, lambda x: _placed(x, how.device, dtype), found)

    expected, calls = watch(model, inputs())
    row.true = len(calls.softmax)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = einscade.optimize(model, inner=how.inner, dynamic=True if how.dynamic else None)
    with torch.no_grad():
        started = time.perf_counter()
        actual = fast(**inputs())
        row.compile_s = time.perf_counter() - started
        if dtype is torch.float32:
            errors = [_error(_tensors(expected), _tensors(actual))]
            if how.dynamic:
                other = inputs(OTHER_LENGTHS)
                errors.append(_error(_tensors(model(**other)), _tensors(fast(**other))))
            row.error, row.scale = max(errors)
        else:
            exact = copy.deepcopy(model).float()(**_widened(inputs()))
            row.error = _relative(_tensors(exact), _tensors(actual))
            row.original_error = _relative(_tensors(exact), _tensors(expected))
    row.graph_breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    left = softmaxes_left(fast, inputs(), inside="einscade::cascade") - calls.other
    sites = einscade.report(fast).sites
    unchanged = [site for site in sites if site.status != "rewritten"]
    written = sum(site.status == "rewritten" and _is_library_call(site.kernel) for site in sites)
    row.rewritten = row.true - max(0, left - written)
    row.found = row.rewritten + len(unchanged)
    beyond = [site.module_path for site in sites if not _inside(site.module_path, calls.softmax)]
    row.linear = sum(_inside(path, calls.linear) for path in beyond)
    row.stray = len(beyond) - row.linear
    row.note = "; ".join(sorted({str(site.reason) for site in unchanged}))
    if how.gradients:
        of, actual = _gradients(model, inputs()), _gradients(fast, inputs(), weights=model)
        if dtype is torch.float32:
            row.gradient_error = max(_gradient_errors(of, actual))
        else:
            exact = _gradients(copy.deepcopy(model).float(), _widened(inputs()))
            row.gradient_error = _mean_square(_gradient_errors(exact, actual))
            row.original_gradient_error = _mean_square(_gradient_errors(exact, of))


def _is_library_call(kernel: Any) -> bool:
    """Whether it stands in the graph as the library's own call, for one that the profiler sees outside any cascade."""
    return kernel is not None and kernel.library_call is not None


def _placed(x: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def _widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, inputs)


def _gradients(model: Any, inputs: dict[str, Any], weights: torch.nn.Module | None = None) -> list[torch.Tensor | None]:
    """Of every weight (of `weights`, where that is another module), where all results are asked for at once, each
    against random numbers."""
    wanted = [p for p in (weights or model).parameters() if p.requires_grad]
    results = [x for x in _tensors(model(**inputs)) if x.requires_grad]
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    return list(torch.autograd.grad(results, wanted, cotangents, allow_unused=True))


def _gradient_errors(expected: list[torch.Tensor | None], actual: list[torch.Tensor | None]) -> list[float]:
    """Of every weight, relative to the norm of its gradient, or to a thousandth of the largest such norm: some
    gradients (a key's bias, under a softmax) are nothing but rounding. NaN anywhere counts as infinite."""
    if [g is None for g in expected] != [g is None for g in actual]:
        raise ValueError("another set of weights has gradients")
    pairs = [(e.double(), a.double()) for e, a in zip(expected, actual, strict=True) if e is not None and a is not None]
    least = 1e-3 * max(float(e.norm()) for e, _ in pairs)
    return [_finite(float((a - e).norm())) / max(float(e.norm()), least) for e, a in pairs]


def _mean_square(errors: list[float]) -> float:
    return math.sqrt(sum(e * e for e in errors) / len(errors))


def _inside(path: str, modules: Iterable[str]) -> bool:
    """Whether a site's module is one of `modules`, or a part of one, or has one as its softmax."""
    return any(f"{path}.".startswith(f"{m}.") or path == m.rpartition(".")[0] for m in modules)


def _tensors(output: Any) -> list[torch.Tensor]:
    """Every floating tensor of a model's output, in a fixed order; caches are states, not results, and are left out."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in _tensors(value)]
    return []


def _error(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> tuple[float, float]:
    """The largest absolute difference, and the largest absolute value for scale. NaN anywhere counts as infinite."""
    if len(expected) != len(actual) or not expected:
        raise ValueError(f"the original returned {len(expected)} tensors, the optimised model {len(actual)}")
    differences = [(a.double() - b.double()).abs().max() for a, b in zip(expected, actual, strict=True)]
    worst = float(torch.stack(differences).max())  # unlike Python's max, NaN whenever there is one
    return _finite(worst), max(float(e.abs().max()) for e in expected)


def _relative(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> float:
    """The norm of all differences over that of what is expected. NaN anywhere counts as infinite."""
    differences = [(a.double() - e.double()).norm() for e, a in zip(expected, actual, strict=True)]
    norm = torch.stack([e.double().norm() for e in expected]).norm()
    return _finite(float(torch.stack(differences).norm() / norm))


def _finite(error: float) -> float:
    return float("inf") if math.isnan(error) else error


# -- all rows ---------------------------------------------------------------------------------------------------------


def _child(connection: Any, *job: Any) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # convolutions behind an attention would make its rounding visible
    connection.send(run(*job))


def _import_once(names: Iterable[str]) -> None:
    """What every forked process would import for itself otherwise, which takes longer than most rows."""
    importlib.import_module("torch._dynamo")
    importlib.import_module("einscade.compiler.compile")
    for name in dict.fromkeys(names):
        with suppress(CannotShrink):  # its row says so
            has_sdpa(name)


def run_all(jobs: Iterable[tuple[Any, ...]], timeout: float, at_once: int) -> Iterator[Row]:
    """The rows of `jobs` (arguments of `run`) as they end. Each is made in a forked process: a crash, a hang or a leak
    is that row's, not the table's."""
    started: list[_Apart] = []
    for job in jobs:
        if len(started) == at_once:
            yield _next(started)
        started.append(_Apart(job, timeout))
    while started:
        yield _next(started)


def _next(started: list[_Apart]) -> Row:
    """The row that ends next, or has no time left; it leaves the list."""
    ended = wait([apart.ours for apart in started], min(apart.left() for apart in started))
    apart = next((a for a in started if a.ours in ended), min(started, key=_Apart.left))
    started.remove(apart)
    return apart.row()


class _Apart:
    """A row on its way."""

    def __init__(self, job: tuple[Any, ...], timeout: float) -> None:
        context = multiprocessing.get_context("fork")
        self.job, self.timeout, self.started = job, timeout, time.monotonic()
        self.ours, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(theirs, *job), daemon=True)
        self.process.start()
        theirs.close()

    def left(self) -> float:
        """Seconds until it is given up."""
        return max(0.0, self.started + self.timeout - time.monotonic())

    def row(self) -> Row:
        name, attention, *_ = self.job
        try:
            if not self.ours.poll(self.left()):
                return Row(name, attention, note=f"no result within {self.timeout:g} s")
            return self.ours.recv()
        except EOFError:
            self.process.join(5)
            return Row(name, attention, note=f"the process died with exit code {self.process.exitcode}")
        finally:
            if self.process.is_alive():
                self.process.terminate()
            self.process.join()


HEADER = ("family", "attention", "true", "found", "rewritten", "stray", "error", "gradients", "breaks", "compile", "")
_WIDTHS = (22, 9, 5, 6, 10, 6, 8, 9, 7, 8, 5)
_TEXT = (0, 1, 10)  # columns of words, aligned left


def _cells(row: Row) -> list[str]:
    def show(value: Any, form: str = "") -> str:
        return "–" if value is None else format(value, form)

    numbers = (row.true, row.found, row.rewritten, row.stray)
    verdict = "" if not row.applies else "ok" if row.ok else "FAIL"
    return [row.family, row.attention, *map(show, numbers), show(row.error, ".1e"),
            show(row.gradient_error, ".1e"), show(row.graph_breaks), show(row.compile_s, ".1f"), verdict]  # fmt: skip


def _line(cells: Iterable[str], note: str = "") -> str:
    padded = [c.ljust(w) if k in _TEXT else c.rjust(w) for k, (c, w) in enumerate(zip(cells, _WIDTHS, strict=True))]
    return " ".join((*padded, note[:160])).rstrip()


def markdown(rows: Iterable[Row]) -> str:
    """The table of the README: a line for each family, eager and sdpa beside each other."""
    families: dict[str, dict[str, Row]] = {}
    for row in rows:
        families.setdefault(row.family, {})[row.attention] = row
    lines = ["| family | eager: true / found / rewritten | error | sdpa: true / found / rewritten | error |",
             "|---|---|---|---|---|"]  # fmt: skip
    for family, made in families.items():
        cells = [family]
        for attention in ATTENTION:
            row = made.get(attention)
            if row is None or not row.applies:
                cells += ["–", "–"]
            else:
                shown = [str(n) if n is not None else "–" for n in (row.true, row.found, row.rewritten)]
                cells += [" / ".join(shown), "–" if row.error is None else f"{row.error:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _summary(rows: list[Row]) -> str:
    totals = [sum(getattr(row, key) or 0 for row in rows) for key in ("true", "found", "rewritten")]
    held = sum(row.ok for row in rows)
    return f"{held} of {len(rows)} rows hold; {totals[0]} sites, {totals[1]} found, {totals[2]} rewritten"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"model types; default: all {len(FAMILIES)} of FAMILIES")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--markdown", action="store_true", help="print the README's table instead")
    parser.add_argument("--write", action="store_true", help="keep the rows in benchmarks/results/zoo.json")
    parser.add_argument("--attention", choices=ATTENTION, help="only this implementation")
    parser.add_argument("--dynamic", action="store_true", help="compile for lengths that move; compare at two lengths")
    parser.add_argument("--gradients", action="store_true", help="compare the gradients of all weights as well")
    parser.add_argument("--device", default="cpu", help="where the models run (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="what they run in (default %(default)s)")
    parser.add_argument("--wide", action="store_true", help="heads as wide as real ones, sequences of several hundred")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument("--commit", help="the commit, where the tree has no git")
    parser.add_argument("--inner", default="eager", help="what compiles the rest of the graph; eager is the quickest")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one row")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at a time; default: one for each core")
    args = parser.parse_args(argv)
    if args.write:
        record.check_clean()
    how = How(args.inner, args.dynamic, args.gradients, args.device, args.dtype, args.wide)
    env = record.environment(args.commit) if args.device == "cpu" else {}

    quiet = args.json or args.markdown
    if not quiet:
        print(_line(HEADER))
    kinds = (args.attention,) if args.attention else ATTENTION
    jobs = [(name, kind) for name in args.names or FAMILIES for kind in kinds]
    _import_once(name for name, _ in jobs)
    rows = []
    for row in run_all(((*job, how) for job in jobs), args.timeout, args.jobs):
        rows.append(row)
        if not quiet:
            print(_line(_cells(row), row.failed or row.note), flush=True)
    rows = sorted((row for row in rows if row.applies), key=lambda row: jobs.index((row.family, row.attention)))
    env = env or record.environment(args.commit)  # processes cannot be forked where a GPU has been used
    figures = {**asdict(how), "rows": [asdict(row) | {"ok": row.ok} for row in rows]}
    if args.out is not None:
        args.out.write_text(json.dumps({"environment": env, "figures": figures}, indent=1) + "\n")
    if args.json:
        print(json.dumps({"environment": env, "figures": figures}, indent=1))
    elif args.markdown:
        print(markdown(rows))
    print(_summary(rows), file=sys.stderr if quiet else sys.stdout)
    if args.write:
        print(f"written to {record.write('zoo', figures, env)}", file=sys.stderr)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
