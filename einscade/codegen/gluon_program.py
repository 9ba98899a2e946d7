"""Programs of several nests for Hopper: gradients, one Gluon kernel for each loop.

Comes in: a `LoopProgram` with more than one nest, and a `Schedule` with tiles for all of them. Goes out: `Source`, a
module whose `run` launches the kernels in order; flat nests (statistics of rows, sums of a group of heads) are torch
operations, as the torch emitter writes them. Nests with a tile of two grid ranks (`cost.crossed`: the gradient of a
bias) are Triton kernels in the same module.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from math import ceil, gcd, prod

import sympy

from einscade.codegen.cost import Lengths, crossed
from einscade.codegen.gluon_ahead import AheadChain
from einscade.codegen.gluon_chain import Chain
from einscade.codegen.gluon_form import Form, nest_form
from einscade.codegen.gluon_frame import IMPORTS
from einscade.codegen.gluon_group import grouped, in_group
from einscade.codegen.gluon_plan import GROUP_ROWS
from einscade.codegen.gluon_resident import ResidentChain
from einscade.codegen.gluon_rows import RowSum, Zeros, row_sum, slice_sum
from einscade.codegen.gluon_schedules import CACHED
from einscade.codegen.gluon_spread import ADD_TILE, Spread, SpreadChain, spread
from einscade.codegen.gluon_text import RUN_MAP, TILE_MAP, marked
from einscade.codegen.loops import FlatNest, LoopProgram, SerialNest
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source, Unsupported
from einscade.codegen.triton_emit import TritonModule
from einscade.codegen.triton_memory import stored
from einscade.codegen.triton_pairs import paired
from einscade.codegen.triton_tables import totalled
from einscade.ir.device import Device
from einscade.ir.expr import accesses, free_vars
from einscade.ir.text import print_einsum

__all__ = ["emit", "schedules"]

TILES = ((3, 64), (2, 128), (2, 64), (2, 32))
"""Warpgroups, and the tile along the loop, that a nest is tried with, best guess first."""

EVEN = 2
"""With fewer programs a processor, those left for the last turn weigh more than what a group in one program saves."""

SHORT = 32
"""Up to so many iterations a window's programs are resident: 18 of 64 queries gained (1024 positions), 128 did not."""

ABREAST = 4
"""So many heads of a window are dealt out together."""

NARROW = 64
"""Up to this width a sum over programs issues the next scores ahead: its sums leave registers for them."""


ADD_IMPORTS = """
from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin
"""


def emit(program: LoopProgram, schedule: Schedule) -> Source:
    """The program's module. Raises `Unsupported` where a nest or the schedule does not fit."""
    return Source("triton", _Program(totalled(paired(program)), schedule).text())


def schedules(
    program: LoopProgram, device: Device | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[Schedule, ...]:
    """Schedules for the program: first those that add up one nest's sums from another's programs, where that fits; then
    every nest at its first choice of tiles, at the second, and so on. Of each kind those with a program for all members
    of a group, where there are such, and those without take turns; else narrow rows are tried with the next scores
    issued ahead and without. Where loops are short, sums over programs are tried with resident ones, too. Raises
    `Unsupported` as `emit` does, and where at these sizes a loop would leave most of the device idle."""
    forms = [nest_form(program.cascade, nest) for nest in _own(program)]
    if not forms:
        raise Unsupported("the program has no loop: there is nothing to write a kernel for")
    variants = [_alternatives(program, forms, forms)]
    whole = _grouped(program, forms)
    if whole != forms:
        with contextlib.suppress(Unsupported):
            variants.insert(0, _alternatives(program, forms, whole))
    if device is not None and sizes is not None:
        lengths = Lengths(program.cascade, sizes)
        if min(_programs(shape, lengths, GROUP_ROWS) for shape in forms) < device.processors // 2:
            raise Unsupported(f"a loop has less than half a warpgroup for each of {device.processors} processors")
        if len(variants) > 1:
            tiles, groups = variants[0][1][0], [x for x in whole if x.members is not None]
            programs = min(_programs(x, lengths, tiles.tile(x.p) or 1) for x in groups)
            if programs < device.processors:
                del variants[0]
            elif programs < EVEN * device.processors or max(_read(x, lengths) for x in groups) > CACHED * device.l2:
                variants.reverse()
    if len(variants) == 1:
        unordered, ordered = variants[0]
        variants = [(list(dict.fromkeys(x for s in unordered for x in (s, replace(s, ahead=False)))), ordered)]
    turns = [row for kind in zip(*variants, strict=True) for row in zip_longest(*kind)]
    found = [s for row in turns for s in row if s is not None]
    if device is not None and sizes is not None:
        merged = _merged(program, forms, forms)
        if len(merged) == 1:
            ((at, (_, sum_)),) = merged.items()
            found = [x for s in found for x in (*_resident(s, forms[at], sum_, lengths, device), s)]
    return tuple(found)


def _resident(schedule: Schedule, shape: Form, sum_: Spread, lengths: Lengths, device: Device) -> list[Schedule]:
    """The schedule with resident programs, where it has a sum over programs whose loops are short: a window's, if they
    are, and those that data decides. A window's neighbours go abreast."""
    if not schedule.unordered or schedule.ahead or schedule.grouped:
        return []
    if _programs(shape, lengths, schedule.tile(shape.p) or 1) <= device.processors:
        return []
    extent = shape.extent(shape.batch[-1]) if shape.batch else sympy.Integer(1)
    abreast = gcd(ABREAST, int(extent)) if extent.is_Integer else 1
    resident = replace(schedule, resident=device.processors, abreast=abreast)
    try:
        chain = _chain(shape, resident, sum_)
    except Unsupported:
        return []
    if chain.listed:
        return [replace(resident, abreast=1)]
    first, end = chain.bounds.first, chain.bounds.end
    window = "row" in free_vars(first) and "row" in free_vars(end)
    middle = {"row": lengths.rank(shape.p) // 2}
    return [resident] if window and lengths.number(end - first, middle) <= SHORT else []


def _alternatives(
    program: LoopProgram, separate: Sequence[Form], forms: Sequence[Form]
) -> tuple[list[Schedule], list[Schedule]]:
    """The schedules with a sum over programs and those without, each best guess first, of nests of these forms;
    `separate`: their forms with a program for each member of a group."""
    grouped = any(shape.members is not None for shape in forms)
    unordered = []
    if merged := _merged(program, separate, forms):
        left_out = {other for other, _ in merged.values()}
        choices = [_choices(shape)[:1] if i in left_out else _choices(shape, merged[i][1] if i in merged else None)
                   for i, shape in enumerate(forms)]  # fmt: skip
        narrow = all(x.width <= NARROW for i in merged for x in (*forms[i].stills, *forms[i].moving))
        ahead = [_choices(forms[i], how, ahead=True) for i, (_, how) in merged.items()] if narrow else []
        tiles = _rows(choices) if all(choices) else []
        unordered = [
            _schedule(t, grouped, True, narrow and all(any(x.items() <= t.items() for x in fit) for fit in ahead))
            for t in tiles
        ]
    return unordered, [_schedule(tiles, grouped) for tiles in _rows([_choices(shape) for shape in forms])]


def _programs(shape: Form, lengths: Lengths, rows: int) -> int:
    """How many programs of so many rows a form has."""
    return ceil(lengths.rank(shape.p) / rows) * prod(map(lengths.rank, shape.batch))


def _read(shape: Form, lengths: Lengths) -> float:
    """How many bytes the loops of a group go through, those of all its members."""
    members = shape.members.count if shape.members is not None else 1
    return members * lengths.rank(shape.m) * sum(x.width for x in shape.moving) * 2


def _own(program: LoopProgram) -> tuple[SerialNest, ...]:
    """The nests that are Gluon kernels."""
    return tuple(n for n in program.serial_nests if not crossed(program.cascade, n))


def _grouped(program: LoopProgram, forms: Sequence[Form]) -> list[Form]:
    """The forms, those with all members of a group in a program whose results only go into sums over the members."""
    found = []
    for shape in forms:
        readers = [e for e in program.cascade.body for a in accesses(e.expr) if a.tensor in shape.results]
        sums = [x for e in readers if (x := slice_sum(program.cascade, e)) is not None]
        alone = len(sums) == len(readers) and not {*shape.results} & {*program.cascade.outputs}
        found.append((grouped(shape, sums) if alone else None) or shape)
    return found


def _schedule(
    tiles: Mapping[str, int], grouped: bool = False, unordered: bool = False, ahead: bool = False
) -> Schedule:
    own = tuple(sorted(tiles.items()))
    return Schedule(own, 4, 2, (), "cuda:90", True, unordered=unordered, ahead=ahead, grouped=grouped)


def _rows(choices: Sequence[Sequence[Mapping[str, int]]]) -> list[dict[str, int]]:
    """The first choice of all, the second of all, and so on; the first again of those that have no more."""
    return [
        {k: v for choice, tried in zip(row, choices, strict=True) for k, v in (choice or tried[0]).items()}
        for row in zip_longest(*choices)
    ]


def _merged(program: LoopProgram, separate: Sequence[Form], forms: Sequence[Form]) -> dict[int, tuple[int, Spread]]:
    """The serial nests that can add up another's sum as they go, with that other nest and how, by their forms with a
    program for each member of a group (`separate`) and those that they have."""
    read = {name for nest in program.nests for name in nest.inputs}
    found: dict[int, tuple[int, Spread]] = {}
    for other, one in enumerate(separate):
        for i, shape in enumerate(separate):
            taken = {i, other} & {*found, *(x for x, _ in found.values())}
            if taken or other == i or read & set(one.results):
                continue
            if (sum_ := spread(one, shape)) is not None:
                if (members := forms[i].members) is not None:
                    sum_ = replace(sum_, values=in_group(sum_.values, members))
                found[i] = (other, sum_)
                break
    return found


def _choices(shape: Form, spread: Spread | None = None, ahead: bool = False) -> list[dict[str, int]]:
    """The tiles that fit a nest, best guess first; with a sum of its programs, or the next scores ahead besides, there
    may be none."""
    found = []
    for groups, columns in TILES:
        tiles = {shape.p: groups * GROUP_ROWS}
        if isinstance(shape.loop.step, sympy.Symbol):
            tiles[shape.loop.step.name] = columns
        try:
            _chain(shape, _schedule(tiles, ahead=ahead), spread)
        except Unsupported as reason:
            last = reason
            continue
        found.append(tiles)
    if not found and spread is None:
        raise Unsupported(f"no tile of the loop over {shape.m} fits: {last}")
    return found


def _chain(shape: Form, schedule: Schedule, spread: Spread | None, cleared: bool = False) -> Chain:
    if spread is None:
        return Chain(shape, replace(schedule, resident=0, abreast=1))
    kind = ResidentChain if schedule.resident else AheadChain if schedule.ahead else SpreadChain
    return kind(shape, schedule, spread, cleared)


class _Program(TritonModule):
    """Launches in place of the serial nests' loops."""

    def __init__(self, program: LoopProgram, schedule: Schedule) -> None:
        super().__init__(program, schedule)
        nests = _own(program)
        others = tuple(n for n in program.serial_nests if n not in nests)
        self.texts: list[str] = []
        self.kernel_schedule = replace(schedule, stages=3, descriptors=False)
        self.memory = stored(replace(program, nests=(*others, FlatNest((), (), ()))), schedule)
        separate = [nest_form(self.cascade, n) for n in nests]
        forms = _grouped(program, separate) if schedule.grouped else separate
        self.forms = dict(zip(nests, forms, strict=True))
        self.summed = {r for shape in forms if shape.members for r in shape.results}
        merged = _merged(program, separate, forms) if schedule.unordered else {}
        self.spreads = {nests[i]: how for i, (_, how) in merged.items()}
        self.left_out = {nests[other] for other, _ in merged.values()}
        self.cleared: set[SerialNest] = set()  # of these, those whose sum is zero by now

    def preamble(self) -> str:
        adds = [ADD_IMPORTS.strip("\n") + "\n", ADD_TILE.strip("\n")] if self.spreads else []
        maps = [TILE_MAP.strip("\n"), RUN_MAP.strip("\n") + "\n"]
        imports = IMPORTS.strip("\n") + "\n"
        if self.kernels:
            imports = imports.replace("torch\n", "torch\nimport triton\nimport triton.language as tl\n", 1)
        return "\n\n\n".join([imports, *adds, *self.texts, *maps]) + self.kernel_texts()

    def neighbours(self, nest: SerialNest) -> tuple[bool, bool]:
        return False, False  # loops as long as these gain nothing by overlapping

    def nest(self, nest: SerialNest | FlatNest) -> None:
        if isinstance(nest, FlatNest):
            nest = replace(nest, einsums=tuple(e for e in nest.einsums if e.name not in self.summed))
            if nest.einsums and not self._row_sum(nest) and not self._slice_sums(nest):
                super().nest(nest)
            return
        if nest in self.left_out:
            return
        if crossed(self.cascade, nest):
            super().nest(nest)
            return
        chain = _chain(self.forms[nest], self.schedule, self.spreads.get(nest), nest in self.cleared)
        self.cleared.add(nest)
        mark = f"_{len(self.texts) + 1}"
        self.texts.append(marked("\n\n\n".join(chain.parts()), mark))
        outputs = [*chain.shape.results, *chain.added]
        for output in outputs:
            self._allocate(output, chain)
        for tensor in (*nest.inputs, *outputs):
            if chain.name(tensor) != self.code(tensor):
                self.out(f"{chain.name(tensor)} = {self.code(tensor)}")
        for line in chain.launch(self.device):
            self.out(re.sub(r"^( *)(kernel|list_tiles|rounded)\[", rf"\1\2{mark}[", line))

    def _allocate(self, output: str, chain: Chain) -> None:
        """A result of a kernel; between two kernels with the width innermost, which is how it is written and read. The
        copy engine writes no other result."""
        ranks = self.cascade.tensors[output].ranks
        tile = next((x for x in chain.shape.written if x.tensor == output), None)
        if tile is not None and dict(self.schedule.out_order).get(output, ranks)[-1] != ranks[tile.across]:
            raise Unsupported(f"{output} with {ranks[tile.across]} not innermost")
        operand = next((x for x in chain.shape.addressed if x.tensor == output), None)
        if operand is None or output in self.cascade.outputs:
            self.allocate(output)
            return
        order = (*(i for i in range(len(ranks)) if i not in (operand.row, operand.across)), operand.row, operand.across)
        shape = ", ".join(self.extent(ranks[i]) for i in order)
        made = f"torch.empty({shape}, dtype=torch.float32, device={self.device})"
        if list(order) != sorted(order):
            made += f".permute({', '.join(str(order.index(i)) for i in range(len(ranks)))})"
        self.out(f"{self.code(output)} = {made}")

    def _slice_sums(self, nest: FlatNest) -> bool:
        """A nest of sums of a few slices, each as a kernel; whether it is one."""
        found = [slice_sum(self.cascade, e) for e in nest.einsums]
        if not all(x is not None and x.name in self.cascade.outputs for x in found):
            return False
        for e, x in zip(nest.einsums, found, strict=True):
            assert x is not None
            name = f"slices_{len(self.texts) + 1}"
            self.texts.append(x.kernel(name))
            self.out(f"# {print_einsum(e)}")
            self.allocate(x.name)
            self.names[x.name] = self.stored(x.name)
            for line in x.launch(name, self.code(x.name), self.code(x.tensor)):
                self.out(line)
        return True

    def _row_sum(self, nest: FlatNest) -> bool:
        """A nest that is one sum along rows, as a kernel; whether it is one."""
        found = row_sum(self.cascade, nest.einsums[0]) if len(nest.einsums) == 1 else None
        if found is None or found.name in self.cascade.outputs:
            return False
        zeros = self._clear(found)
        name = f"rows_{len(self.texts) + 1}"
        self.texts.append(found.kernel(name, zeros))
        self.out(f"# {print_einsum(nest.einsums[0])}")
        result = self.names[found.name] = self.stored(found.name)
        codes = {t: self.code(t) for t, _ in found.tensors}
        for line in found.launch(name, result.code, codes, self.device, zeros):
            self.out(line)
        return True

    def _clear(self, total: RowSum) -> Zeros:
        """What the kernel of a row sum sets to zero: a sum over programs to come that has the same rows."""
        for nest, how in self.spreads.items():
            ranks = {self.cascade.tensors[how.result.tensor].ranks[i] for i in how.result.order[:-1]}
            if nest not in self.cleared and ranks == {r for r, _ in total.rows}:
                self.cleared.add(nest)
                chain = _chain(self.forms[nest], self.schedule, how)
                assert isinstance(chain, SpreadChain)
                return chain.zeros
        return {}
