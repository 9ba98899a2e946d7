"""What einscade sees in a model, without changing it: the cascade, every rewrite, and the generated kernel.

python examples/explain.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import einscade

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.quickstart import Attention


def main() -> None:
    torch.manual_seed(0)
    report = einscade.explain(Attention().eval(), torch.randn(2, 300, 256))
    print(report)
    for site in report.sites:
        print(f"\n{site.module_path or '(the module itself)'}, {site.source}: {site.status} {site.reason or ''}")
        print(f"\nas found:\n{site.cascade}")
        print("\nrewrites:")
        for step in site.steps:
            print(f"  {step.name:<12} {step.identity if step.changed else 'not applied: ' + str(step.reason)}")
        print(f"\nas rewritten:\n{site.rewritten}")
        print(f"\nthe kernel:\n{site.kernel.source}")


if __name__ == "__main__":
    main()
