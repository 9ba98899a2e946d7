"""What would be done with a call, without doing it.

Comes in: a model and the arguments of a call. Goes out: a `Report` with every site, its cascades and its kernel.

Dynamo traces the call into one graph where it can; nothing runs and nothing is compiled into the model. A model that
Dynamo has to break is traced piece by piece on copies: its graphs return zeros in place of results, so that tracing can
go on, and the report lists the breaks.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from einscade.compiler.capture import CaptureError, fake_inputs, made_fake
from einscade.compiler.compile import constants_of, rewritten, weights_of
from einscade.compiler.frame import framed
from einscade.compiler.graph_module import flat_inputs
from einscade.compiler.report import Report
from einscade.runtime import progress
from einscade.runtime.messages import first_line

__all__ = ["explain_call"]


def explain_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], recipe: str) -> Report:
    report = Report(recipe, "nothing: not compiled")
    try:
        if isinstance(model, fx.GraphModule):
            flat = flat_inputs(model, args, kwargs)
            _note(model, made_fake(flat), {}, set(), report)
        else:
            _trace(model, args, dict(kwargs), report)
    finally:
        progress.finish()
    return report


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], report: Report) -> None:
    from torch._dynamo.exc import TorchDynamoException

    try:
        _capture(model, args, kwargs, report)
    except _Captured:
        return
    except TorchDynamoException as stop:
        report.breaks.append(_told(stop))
        del report.sites[:]
        report.graphs = 0
        try:
            _piecewise(model, args, kwargs, report)
        except Exception as error:  # the zeros in place of results can break code that looks at values
            report.unchanged_graphs.append(f"tracing stopped: {_told(error)}")


class _Captured(BaseException):
    """Leaves a traced call before its graph would run; not an Exception, so that no model catches it."""


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], report: Report) -> None:
    """One graph or an error of Dynamo's. The compiled call is left before anything runs."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        _note(gm, fake_inputs(gm, inputs), constants_of(gm, inputs), weights_of(gm, inputs), report)

        def leave(*_: Any) -> Any:
            raise _Captured

        return leave

    _call(model, backend, args, kwargs, fullgraph=True)


def _piecewise(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], report: Report) -> None:
    """Every graph between breaks, on copies of the model and of the arguments."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        _note(gm, fake_inputs(gm, inputs), constants_of(gm, inputs), weights_of(gm, inputs), report)
        results = gm.graph.output_node().args[0]
        values = fx.node.map_arg(results, lambda n: n.meta.get("example_value"))
        return lambda *_: pytree.tree_map_only(FakeTensor, _zeros, values)

    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and not t.is_leaf]
    memo: dict[int, Any] = {id(t): t.detach().clone().requires_grad_() for t in given}  # copy takes leaves only
    model, args, kwargs = copy.deepcopy((model, args, kwargs), memo)
    with _random_state_kept():
        _call(model, backend, args, kwargs, fullgraph=False)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Code between graphs runs, and may draw random numbers: none of the caller's."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _told(error: Exception) -> str:
    """The error in one line; where Dynamo ran an operation that fails, what that operation said."""
    cause = re.search(r"got (\w+\(.*\))$", str(error), re.MULTILINE)
    return cause[1][:300] if cause else first_line(error)


def _call(model: nn.Module, backend: Any, args: tuple[Any, ...], kwargs: dict[str, Any], fullgraph: bool) -> None:
    """Traces in a cache of its own: what the user compiled before stays compiled."""
    entries = torch._dynamo.config.patch(recompile_limit=1 << 10, accumulated_recompile_limit=1 << 12)
    with entries:
        torch.compile(framed(model), backend=backend, fullgraph=fullgraph, dynamic=False)(*args, **kwargs)


def _note(
    gm: fx.GraphModule, fakes: list[Any], constants: dict[str, torch.Tensor], weights: set[str], report: Report
) -> None:
    try:
        rewritten(gm, fakes, report.recipe, report, constants, weights)
    except CaptureError as stop:
        report.add((), f"not captured: {stop}")


def _zeros(fake: FakeTensor) -> torch.Tensor:
    sizes = [int(n.node.hint) if isinstance(n, torch.SymInt) else n for n in fake.shape]
    return torch.zeros(sizes, dtype=fake.dtype, device=fake.device)
