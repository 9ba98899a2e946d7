"""Every example runs as its docstring says and prints what it promises; the worked pass does what its page claims."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run
from einscade.passes.rewrite import NotApplicable
from examples import own_pass

ROOT = Path(__file__).resolve().parents[1]


def _output(example: str, *options: str) -> str:
    environment = os.environ | {"COLUMNS": "120"}
    done = subprocess.run(
        (sys.executable, f"examples/{example}.py", *options),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def _figure(pattern: str, text: str) -> float:
    found = re.search(pattern + r"\s*([0-9.e+-]+)", text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1])


@pytest.mark.long
def test_quickstart() -> None:
    out = _output("quickstart")
    assert _figure("largest difference:", out) < 1e-5
    assert _figure("as a backend:", out) < 1e-5
    assert "1 of 1" in out


@pytest.mark.long
def test_explain() -> None:
    out = _output("explain")
    assert "as found:\ncascade" in out
    assert "as rewritten:\ncascade" in out
    assert "def run(" in out


@pytest.mark.long
def test_train() -> None:
    out = _output("train")
    assert _figure("largest relative difference of a loss:", out) < 1e-4


def test_own_pass() -> None:
    assert _figure("largest difference in float64:", _output("own_pass")) < 1e-12


@pytest.mark.slow
def test_demo() -> None:
    """With six of the decoder's layers, as many as the encoder has; all thirty are in `test_pretrained`."""
    out = _output("demo", "--short")
    assert "✓ 6 of 6 attention sites rewritten in SmolLM2" in out
    assert "✓ 6 of 6 attention sites rewritten in MiniLM" in out
    assert "24 of 24 greedy tokens" in out
    assert "✗" not in out


def _capped(**changes: str) -> str:
    text = own_pass.CAPPED
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    return text


class TestUnshift:
    """The pass of docs/add-a-pass.md."""

    def test_its_page_shows_its_lines(self) -> None:
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add-a-pass.md").read_text(), re.DOTALL)
        shown = [line.strip().removesuffix(" ...") for block in blocks for line in block.splitlines() if line.strip()]
        written = {line.strip() for line in (ROOT / "examples" / "own_pass.py").read_text().splitlines()}
        assert len(shown) > 10
        assert not [line for line in shown if line not in written]

    def test_drops_the_maximum(self) -> None:
        cascade = own_pass.Unshift().apply(parse_cascade(own_pass.CAPPED))
        assert [s.name for s in cascade.body] == ["A", "S", "W", "Z", "O"]

    @pytest.mark.parametrize("length", [1, 5, 12])
    def test_keeps_the_value(self, length: int) -> None:
        before = parse_cascade(own_pass.CAPPED)
        after = run(before, own_pass.with_unshift()).cascade
        inputs = {n: 3 * torch.randn(2, 4, length, 16, dtype=torch.float64) for n in ("Q", "K", "V")}
        sizes = {"B": 2, "P": length, "M": length}
        tiles = {name: 4 for name in after.symbols if name not in sizes}
        assert not any(s.reduce and s.reduce.monoid == "max" for s in after.body), "the recipe put the maximum back"
        torch.testing.assert_close(
            interpret(after, inputs, sizes | tiles), interpret(before, inputs, sizes), rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (("20 * tanh(0.05 * A[b,h,p,m])", "2 * A[b,h,p,m]"), "no exponential"),
            (("20 * tanh", "80 * tanh"), "no exponential"),
            (("V[b,h,m,f] / Z[b,h,p]", "V[b,h,m,f] * Z[b,h,p]"), "depends on the scale"),
        ],
    )
    def test_refuses(self, change: tuple[str, str], reason: str) -> None:
        """Unbounded scores; a bound above the limit; an output that would see the maximum."""
        with pytest.raises(NotApplicable, match=reason):
            own_pass.Unshift().apply(parse_cascade(_capped(change=change)))
