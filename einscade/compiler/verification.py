"""Original against optimised on real inputs: the bound that exact recipes promise.

The error of the optimised model may be at most 1.5 times the error that the original makes itself, both measured as
relative Frobenius distance from the original in float64. Where the model cannot run in float64, the two are compared
with each other, and the bound is `DIRECT` units in the last place of the dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from einscade.compiler.report import Report

__all__ = ["VerificationError", "verify_call"]

FACTOR = 1.5
DIRECT = 64
"""A whole model, with rounding in every layer, drifts by some units in the last place."""


class VerificationError(RuntimeError):
    """The optimised model differs from the original by more than rounding explains; the message has the figures."""


def verify_call(
    original: nn.Module, optimised: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], report: Report
) -> None:
    """Runs both once (without gradients, from one state of the random generator) and compares every floating output.

    Raises VerificationError.
    """
    expected = _tensors(_run(original, args, kwargs))
    actual = _tensors(_run(optimised, args, kwargs))
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in actual]:
        raise VerificationError(
            f"verify: the original returns tensors {_shapes(expected)}, the optimised model {_shapes(actual)}"
        )
    exact = _in_float64(original, args, kwargs)
    for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
        where = f"verify: output {i} of {len(expected)} {tuple(a.shape)} {str(a.dtype).removeprefix('torch.')}"
        if not a.is_floating_point():
            if not torch.equal(a, b):
                raise VerificationError(f"{where}: {int((a != b).sum())} of {a.numel()} elements differ")
            continue
        if bool((b.isfinite() < a.isfinite()).any()):
            raise VerificationError(f"{where}: NaN or infinity where the original has none")
        eps = torch.finfo(a.dtype).eps
        if exact is not None:
            reference = exact[i]
            ours, theirs = distance(b, reference), distance(a, reference)
            if ours > max(FACTOR * theirs, 4 * eps):
                raise VerificationError(
                    f"{where}: relative error {ours:.2e} against float64, the original's is {theirs:.2e}; "
                    f"the bound is {FACTOR} times that. {_rewritten(report)}"
                )
        elif (apart := distance(b, a)) > DIRECT * eps:
            raise VerificationError(
                f"{where}: relative difference {apart:.2e} from the original, the bound is {DIRECT * eps:.2e} "
                f"(no float64 run of this model was possible). {_rewritten(report)}"
            )


def distance(a: torch.Tensor, reference: torch.Tensor) -> float:
    """‖a − reference‖ / ‖reference‖ in float64, over the points where the reference is finite."""
    a, reference = a.double(), reference.double()
    finite = reference.isfinite()
    a, reference = a[finite], reference[finite]
    scale = float(reference.norm())
    return float((a - reference).norm()) / scale if scale else float((a - reference).norm())


def _run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One call on copies of the arguments: caches that a call fills are not shared by the runs."""
    args, kwargs = copy.deepcopy((tuple(args), dict(kwargs)))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(0)
        return model(*args, **kwargs)


def _in_float64(original: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor] | None:
    def widened(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    try:
        model = copy.deepcopy(original).double()
        result = _run(model, *pytree.tree_map(widened, (tuple(args), dict(kwargs))))
        return _tensors(result)
    except Exception:  # no float64 on this device, too little memory, a dtype written into the model
        return None


def _tensors(result: Any) -> list[torch.Tensor]:
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    return [t.detach() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def _shapes(tensors: Sequence[torch.Tensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)


def _rewritten(report: Report) -> str:
    sites = ", ".join(s.module_path or s.source for s in report.sites[:3] if s.status == "rewritten")
    return f"Rewritten: {sites or 'nothing'}{', …' if len(report.sites) > 3 else ''}"
