"""benchmarks/decode.py at small sizes: what it counts, what it checks, what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import decode
from benchmarks.decode import ROWS, Row, tiny


def row(name: str) -> Row:
    return next(r for r in ROWS if r.name == name)


@pytest.mark.long
def test_the_table_of_small_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    names = ["ragged, pages of 16", "12 packed documents from"]
    decode.main(["--tiny", "--only", *names, "--out", str(out), "--commit", "abc"])
    report = json.loads(out.read_text())
    assert report["environment"]["commit"] == "abc"
    assert report["figures"]["tiny"]
    assert len(report["figures"]["rows"]) == 2
    for result in report["figures"]["rows"].values():
        assert "problem" not in result
        assert result["error"] <= 1.5 * result["math_error"]
        assert result["einscade"] > 0
    assert "ragged, pages of 16" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["whole", "ragged", "documents"])
def test_a_wrong_result_is_found(kind: str) -> None:
    case = tiny(next(r for r in ROWS if r.kind == kind))
    arguments = case.inputs("cpu")
    out = case.model()(*(x.double() if x.is_floating_point() else x for x in arguments)).bfloat16()
    right, plain = decode.errors(case, arguments, out)
    assert right <= 1.5 * plain
    out[-1, -1, -1] += 0.1
    wrong, _ = decode.errors(case, arguments, out)
    assert wrong > 1.5 * plain


def test_what_is_counted() -> None:
    torch.manual_seed(0)
    whole = Row("", "whole", 2, 8, 2, 100, width=16)
    assert whole.work(whole.inputs("cpu")) == 2 * 100 * 2 * 16 * 4
    ragged = Row("", "ragged", 4, 8, 2, 640, width=16)
    arguments = ragged.inputs("cpu")
    assert sorted(arguments[-1].tolist()) == [10, 40, 160, 640]
    assert ragged.work(arguments) == 850 * 2 * 16 * 4
    packed = Row("", "documents", 1, 2, 2, 510, width=16)
    doc = packed.inputs("cpu")[-1]
    points = int(decode.same_document(doc).sum())
    assert packed.work(packed.inputs("cpu")) == points * 4 * 16 * 2
    assert len(doc.unique()) == 12


def test_sizes_for_a_gpu_need_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        decode.main([])
