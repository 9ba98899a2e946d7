"""Uniform registers that a kernel may read before anything has defined them.

Comes in: the assembly of a kernel (`nvdisasm -c`, with the targets of its indirect branches). Goes out: the
instructions that read such a register on some path from the entry. ptxas of CUDA 12.8 (Triton 3.6's) gave a warpgroup's
products a descriptor that only another warpgroup's code had made: each of them begins with a jump through a table, and
none of their code comes before another's. Such a kernel reads from wherever a register of an earlier one points.
"""

from __future__ import annotations

import re

__all__ = ["undefined"]

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);?\s*$")
_NO_RESULT = ("UTMA", "UBLK", "USETMAXREG", "UISETP", "UCGABAR")
COUNT = 64


def undefined(assembly: str) -> list[str]:
    """The instructions, as text."""
    code: list[tuple[str, str | None, str, str]] = []
    labels: dict[str, int] = {}
    for line in assembly.split("\n"):
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append((line.strip(), *found.groups()))
    follow = [_following(i, *x, labels) for i, x in enumerate(code)]
    effects = [_registers(name, given) for _, _, name, given in code]
    known: dict[int, frozenset[int]] = {0: frozenset()}  # on every path to an instruction
    work = [0]
    while work:
        at = work.pop()
        after = known[at] | effects[at][1]
        for i in (i for i in follow[at] if i < len(code)):
            here = known.get(i, frozenset(range(COUNT))) & after
            if here != known.get(i):
                known[i] = here
                work.append(i)
    return [code[i][0] for i in sorted(known) if effects[i][0] - known[i]]


def _following(i: int, line: str, predicate: str | None, name: str, given: str, labels: dict[str, int]) -> list[int]:
    kind = name.split(".")[0]
    jumps = [labels[x] for x in re.findall(r"\.L_x_\d+", line)] if kind != "BSSY" else []  # says where threads meet
    if kind == "BRX":
        assert jumps, "a jump without targets"
        return jumps
    if kind in ("EXIT", "RET", "BRA") and predicate is None and not re.search(r"\bU?P\d", given):
        return jumps
    return [*jumps, i + 1]


def _registers(name: str, given: str) -> tuple[set[int], set[int]]:
    """What an instruction reads, and what it defines."""
    first, *rest = [x.strip() for x in given.split(",")]
    uniform = re.match(r"U|S2UR|R2UR|REDUX|VOTEU", name) and not name.startswith(_NO_RESULT)
    makes = re.fullmatch(r"UR(\d+)", first) if uniform else None
    read: set[int] = set()
    for x in rest if makes else (first, *rest):
        if found := re.search(r"gdesc\[UR(\d+)\]", x):  # two; the first is unused where registers are the left operand
            at = int(found[1])
            read |= {at + 2, at + 3} | (set() if re.search(r", R\d+\S*, gdesc", given) else {at, at + 1})
        else:
            read |= {int(n) for n in re.findall(r"\bUR(\d+)\b", x)}
    if not makes:
        return read, set()
    at = int(makes[1])
    return read, {at, at + 1} if ".64" in name or ".WIDE" in name else {at}
