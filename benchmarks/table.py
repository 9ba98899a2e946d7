"""The tables of README.md and docs/performance.md that show benchmarks/results/h200.json.

    python benchmarks/table.py            prints them
    python benchmarks/table.py --write    puts them into both files, in place of what is there
    python benchmarks/table.py FILE       of another file of benchmarks/h200.py

Comes in: the JSON of one run. Goes out: Markdown. `full` is a line for each row with all peers, what the row is to
reach, and why peers have no figure; `summary` holds each row against the fastest of its peers alone. In the texts they
stand between `<!-- h200: full -->` (or `summary`) and `<!-- h200: end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import record
from benchmarks.h200_peers import TITLES
from benchmarks.h200_rows import ROWS, Row

__all__ = ["BLOCKS", "filled", "full", "header", "line", "reasons", "summary"]

NONE = "–"
COLUMNS = ("TFLOP/s", "einscade", "to reach", "of the fastest peer", *TITLES.values())
FILES = ("README.md", "docs/performance.md")


def header(*more: str) -> str:
    """The head of a table of `line`s, which may have more columns."""
    columns = [*COLUMNS, *more]
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def line(row: Row, figures: Mapping[str, Any], *more: str) -> str:
    """A row of the table; figures that reach all there is to reach are bold."""
    fastest = _fastest(figures)
    ratio = f"{figures['tflops'] / fastest[1]:.2f} ×" if fastest and "tflops" in figures else NONE
    peers = (_number(figures.get(peer)) for peer in TITLES)
    cells = [_work(row), _ours(row, figures), _to_reach(row, figures), ratio, *peers, *more]
    return f"| {' | '.join(cells)} |"


def reasons(figures: Mapping[str, Mapping[str, Any]], peers: Sequence[str]) -> list[str]:
    """Why rows, or these peers of them, have no figure."""
    rows: dict[str, list[str]] = defaultdict(list)
    for name, found in figures.items():
        for who in ("problem", *peers):
            why = found.get(who)
            if isinstance(why, str):
                rows[f"{TITLES.get(who, 'einscade')}: {why.removeprefix('no: ')}"].append(name)
    return [f"{why} ({', '.join(names)})" for why, names in rows.items()]


def full(run: Mapping[str, Any]) -> str:
    """Every row, also those that the run does not have."""
    figures = run["figures"]
    said = [f"* {reason}".replace("|", "/") for reason in reasons(figures, list(TITLES))]
    lines = [line(row, figures.get(row.name, {})) for row in ROWS]
    return "\n".join([_source(run), "", header(), *lines, *(["", "Without a figure:", "", *said] if said else [])])


def summary(run: Mapping[str, Any]) -> str:
    """Each row that was measured, beside the fastest of its peers."""
    lines = ["| work | einscade, TFLOP/s | the fastest peer |", "|---|---|---|"]
    for row in ROWS:
        figures = run["figures"].get(row.name, {})
        if "tflops" in figures:
            fastest = _fastest(figures)
            ratio = f"{figures['tflops'] / fastest[1]:.2f} × {TITLES[fastest[0]]} ({fastest[1]:g})" if fastest else NONE
            lines.append(f"| {_work(row)} | {_ours(row, figures)} | {ratio} |")
    return "\n".join([_source(run), "", *lines])


BLOCKS: dict[str, Callable[[Mapping[str, Any]], str]] = {"full": full, "summary": summary}
_BLOCK = re.compile(r"(<!-- h200: (\w+) -->\n).*?(<!-- h200: end -->)", re.DOTALL)


def filled(text: str, run: Mapping[str, Any]) -> str:
    """The text with what the run makes of each of its blocks. Raises ValueError where it has none."""
    found, count = _BLOCK.subn(lambda block: block[1] + BLOCKS[block[2]](run) + "\n" + block[3], text)
    if not count:
        raise ValueError("no block to fill: mark one with <!-- h200: full --> and <!-- h200: end -->")
    return found


def _work(row: Row) -> str:
    heads = f"H{row.heads}" if row.shared == 1 else f"H{row.heads}/{row.heads // row.shared}"
    return f"{row.name}, B{row.batch or row.length} {heads} N{row.length} D{row.width}"


def _ours(row: Row, figures: Mapping[str, Any]) -> str:
    met = [bound["met"] for bound in row.bounds(figures).values() if bound["met"] is not None]
    return f"**{_number(figures['tflops'])}**" if met and all(met) else _number(figures.get("tflops"))


def _to_reach(row: Row, figures: Mapping[str, Any]) -> str:
    bounds = row.bounds(figures)
    factors = {peer: f"{factor:g} × {TITLES[peer]}" if factor != 1 else TITLES[peer] for peer, factor in row.beside}
    cells = [
        _number(bound["tflops"]) + (f" ({factors[name]})" if name in factors else "") for name, bound in bounds.items()
    ]
    return ", ".join(cells) or NONE


def _fastest(figures: Mapping[str, Any]) -> tuple[str, float] | None:
    seen = [(peer, figures[peer]) for peer in TITLES if isinstance(figures.get(peer), (int, float)) and figures[peer]]
    return max(seen, key=lambda pair: pair[1], default=None)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else NONE


def _source(run: Mapping[str, Any]) -> str:
    env = run["environment"]
    versions = ", ".join(f"{name} {env['versions'][name]}" for name in ("torch", "triton"))
    return f"Commit `{env['commit'][:7]}`, {env['date'][:10]}, {env['gpu']}, {versions}:"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=record.RESULTS / "h200.json")
    parser.add_argument("--write", action="store_true", help=f"into {' and '.join(FILES)}")
    args = parser.parse_args()
    run = json.loads(args.file.read_text())
    if args.write:
        for path in (record.ROOT / name for name in FILES):
            path.write_text(filled(path.read_text(), run))
    else:
        print("\n\n".join(make(run) for make in BLOCKS.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
