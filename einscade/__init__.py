"""einscade: an attention compiler for PyTorch.

    fast = einscade.optimize(model)                # same call, same state_dict, exact
    print(einscade.explain(model, *args))          # what would be done, and why
    print(einscade.report(fast))                   # what was done

`torch.compile(model, backend="einscade")` is the same as a backend. Importing this module registers the operators that
rewritten graphs contain; the compiler is loaded when one of these names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import einscade.compiler.operators as _operators  # noqa: F401  (registers the operators)

if TYPE_CHECKING:
    from einscade.compiler.driver import VerificationError, explain, optimize, report
    from einscade.compiler.report import Report

__version__ = "0.1.0"
__all__ = ["Report", "VerificationError", "explain", "optimize", "report"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = "einscade.compiler.report" if name == "Report" else "einscade.compiler.driver"
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
