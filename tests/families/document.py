"""The cascades that docs/architecture.md shows under "Room for what comes", printed by the code.

`python -m tests.families.document` writes them into the chapter, between the marks `<!-- name -->` and the end of the
block that follows; a test checks that nothing would change.
"""

from __future__ import annotations

import re
from pathlib import Path

import sympy

from einscade.ir import Cascade, var
from einscade.ir.text import parse_cascade, print_cascade, print_expr
from einscade.passes.chunk import Chunk
from einscade.passes.defer import Defer
from einscade.passes.domains import certain, edges, possible, span
from einscade.passes.online import Online
from einscade.passes.quantize import Quantize
from einscade.passes.reassociate import Reassociate
from einscade.passes.rewrite import Rewrite
from einscade.passes.select import Select
from einscade.passes.smooth import Smooth
from einscade.passes.split import Split

CHAPTER = Path(__file__).parents[2] / "docs" / "architecture.md"

ATTENTION = """
cascade attention(Q[b,h,p,e]: bf16, K[b,g,m,e]: bf16, V[b,g,m,f]: bf16) -> O
  where b < B, h < 32, g < 8, p < P, m < M, e < 128, f < 128
  S[b,h,p,m] = sum(e) 0.125 * Q[b,h,p,e] * K[b,h // 4,m,e]   if {domain}
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h // 4,m,f] / Z[b,h,p]
"""
LINEAR = """
cascade linear(Q[b,h,p,e]: bf16, K[b,h,m,e]: bf16, V[b,h,m,f]: bf16{more}) -> O
  where b < B, h < 16, p < N, m < N, e < 128, f < 128
  A[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e]{domain}
  O[b,h,p,f]: bf16 = sum(m) {decay}A[b,h,p,m] * V[b,h,m,f]
"""


def rewritten(text: str, *rewrites: Rewrite) -> Cascade:
    cascade = parse_cascade(text)
    for rewrite in rewrites:
        cascade = rewrite.apply(cascade)
    return cascade


def statements(cascade: Cascade) -> str:
    """The cascade's statements without its header."""
    lines = print_cascade(cascade).splitlines()
    first = next(i for i, line in enumerate(lines) if " = " in line)
    return "\n".join(line.removeprefix("  ") for line in lines[first:])


def window() -> str:
    cascade = parse_cascade(ATTENTION.replace("{domain}", "m <= p & (p - m < 1024 | m < 4)"))
    scores = cascade.definitions["S"]
    tile = edges(r.name for r in cascade.ranks)
    reach = span(scores.domain, "m", tile)
    return "\n".join(
        f"{name:9}{print_expr(value)}"
        for name, value in (
            ("domain", scores.domain),
            ("span", var("m") < sympy.Min(var("M"), reach.stop)),
            ("possible", possible(scores.domain, tile)),
            ("certain", certain(scores.domain, tile)),
        )
    )


def select() -> str:
    diagonal = sympy.Eq(var("m"), var("p"))
    return statements(rewritten(ATTENTION.replace("{domain}", "m <= p"), Select("p", "m", 16, 64, 64, diagonal)))


def quantize() -> str:
    text = ATTENTION.replace("{domain}", "m <= p")
    keys = Quantize("Kcentred", (("m", 64), ("e", 0)))
    return statements(rewritten(text, Smooth("K", "m"), keys, Quantize("Q", (("p", 128), ("e", 0)))))


def reassociate() -> str:
    return statements(
        rewritten(LINEAR.format(more="", domain="", decay=""), Reassociate("m")),
    )


def chunk() -> str:
    text = LINEAR.format(more=", l[h]", domain="   if m <= p", decay="l[h]**(p - m) * ")
    return statements(rewritten(text, Chunk("p", "m", 64)))


def split() -> str:
    return statements(rewritten(ATTENTION.replace("{domain}", "m <= p"), Defer(), Split("m")))


def split_online() -> str:
    whole = statements(rewritten(ATTENTION.replace("{domain}", "m <= p"), Defer(), Split("m", 8), Online()))
    return "\n".join(line for line in whole.splitlines() if line.startswith(("Gs[", "Zs[", "G[", "Z[")))


BLOCKS = {
    "window": window,
    "select": select,
    "quantize": quantize,
    "reassociate": reassociate,
    "chunk": chunk,
    "split": split,
    "split_online": split_online,
}


def updated(text: str) -> str:
    """The chapter with every block as the code prints it now."""
    for name, block in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n```\n).*?(^```$)", re.DOTALL | re.MULTILINE)
        if not pattern.search(text):
            raise ValueError(f"{CHAPTER}: no block marked <!-- {name} -->")
        printed = block() + "\n"
        text = pattern.sub(lambda found, printed=printed: found[1] + printed + found[2], text)
    return text


if __name__ == "__main__":
    CHAPTER.write_text(updated(CHAPTER.read_text()))
