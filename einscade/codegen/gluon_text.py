"""Parts of a generated Gluon module that are the same in all of them, and how its functions are laid out."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

__all__ = [
    "REDUCTIONS", "RUN_MAP", "TABLE_MAP", "TILE_MAP", "TURN", "allocated", "call", "function", "indent",
    "is_atomic", "marked", "paren", "wrapped",
]  # fmt: skip

REDUCTIONS = {
    "row_parts": '''
@gluon.jit
def row_parts(x):
    """Sums along rows as far as a thread goes alone: eight parts a row, in independent chains of additions."""
    return gl.sum(x.reshape([64, STEP // 8, 8]), axis=1)
''',
    "quarter": '''
@gluon.jit
def quarter(x):
    """The first columns of a tile."""
    first, _ = x.reshape([64, 2, STEP // 2]).permute([0, 2, 1]).split()
    first, _ = first.reshape([64, 2, STEP // 4]).permute([0, 2, 1]).split()
    return first
''',
    "row_sum": """
@gluon.jit
def row_sum(x):
    return gl.convert_layout(gl.sum(row_parts(x), axis=1), ROW)
""",
    "row_max": '''
@gluon.jit
def row_max(x):
    """Eight parts a row first: chains of maxima that do not wait for each other."""
    return gl.convert_layout(gl.max(gl.max(x.reshape([64, STEP // 8, 8]), axis=1), axis=1), ROW)
''',
    "row_min": """
@gluon.jit
def row_min(x):
    return gl.convert_layout(gl.min(gl.min(x.reshape([64, STEP // 8, 8]), axis=1), axis=1), ROW)
""",
}

TURN = '''
@gluon.constexpr_function
def barrier(instruction, group):
    return f"bar.{instruction} {8 + group % GROUPS.value}, 256; mov.u32 $0, 0;"


@gluon.jit
def take_turn(group: gl.constexpr):
    """Wait until the warpgroup before this one has issued its products."""
    text: gl.constexpr = barrier("sync", group)
    gl.inline_asm_elementwise(text, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(group: gl.constexpr):
    text: gl.constexpr = barrier("arrive", group + 1)
    gl.inline_asm_elementwise(text, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
'''

TILE_MAP = '''
def copyable(x: torch.Tensor) -> bool:
    """Whether the copy engine can take a tensor's address and strides."""
    size = x.element_size()
    fits = all(n == 1 or (s > 0 and s * size % 16 == 0) for n, s in zip(x.shape[:-1], x.stride()[:-1]))
    return fits and x.data_ptr() % 16 == 0 and x.stride(-1) == 1


def tile_map(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """The copy engine's view of x as tiles of its last two dimensions; of a copy where its strides or address are
    none that the engine can take."""
    if x.numel() == 0:
        x = x.new_zeros([max(1, n) for n in x.shape])
    if not copyable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    size = x.element_size()
    strides = [s if n > 1 else -(-x.shape[-1] * size // 16) * 16 // size for n, s in zip(x.shape, x.stride())]
    layout = gl.NVMMASharedLayout(min(128, width * size), 8 * size, x.dim())
    block = [1] * (x.dim() - 2) + [rows, width]
    return TensorDescriptor(x, list(x.shape), strides[:-1] + [1], block, layout)
'''

TABLE_MAP = '''
def table_map(x: torch.Tensor, rows: int, width: int) -> tuple[TensorDescriptor | torch.Tensor, bool]:
    """The same of a table, and that there is one; the table itself where the copy engine cannot take it as it is."""
    if x.numel() and copyable(x):
        return tile_map(x, rows, width), True
    return x, False
'''


RUN_MAP = '''
def run_map(x: torch.Tensor, columns: int, ranks: int = 1) -> TensorDescriptor:
    """The copy engine's view of x, in no fewer ranks, as runs of its last dimension; of a copy, in rows of whole 64
    bytes, where its strides or address are none that the engine can take."""
    x = x[(None,) * (ranks - x.dim())]
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    if x.numel() == 0:
        x = x.new_zeros([max(1, n) for n in x.shape])
    size = x.element_size()
    usable = x.data_ptr() % 16 == 0 and x.stride(-1) == 1
    usable &= all(n == 1 or (s > 0 and s * size % 16 == 0) for n, s in zip(x.shape[:-1], x.stride()[:-1]))
    if not usable:
        padded = x.new_empty((*x.shape[:-1], -(-x.shape[-1] // 32) * 32))
        x = padded[..., : x.shape[-1]].copy_(x)
    if x.dtype == torch.int64:  # as two words each
        x, columns, size = x.view(torch.int32), 2 * columns, 4
    strides = [s if n > 1 else 32 for n, s in zip(x.shape[:-1], x.stride()[:-1])] + [1]
    layout = gl.NVMMASharedLayout(0, 8 * size, x.dim())
    return TensorDescriptor(x, list(x.shape), strides, [1] * (x.dim() - 1) + [columns], layout)
'''


def is_atomic(code: str) -> bool:
    """Whether the code binds as tightly as a name: no operator outside of brackets."""
    depth = 0
    for c in code:
        if c in "([":
            depth += 1
        elif c in ")]":
            depth -= 1
        elif depth == 0 and not (c.isalnum() or c in '._"'):
            return False
    return True


def paren(code: str) -> str:
    """The code of a size as an operand: a name, a number and a quotient that is rounded up stand for themselves."""
    rounded = code.startswith("-(-") and is_atomic(code[1:])
    return code if code.replace("_", "").isalnum() or rounded else f"({code})"


def indent(lines: Iterable[str]) -> list[str]:
    """The lines of a block."""
    return ["    " + line for line in lines]


def wrapped(text: str, depth: int) -> list[str]:
    """Arguments over as many lines as they take, `depth` spaces deep."""
    pad = " " * depth
    return textwrap.wrap(text, 112, initial_indent=pad, subsequent_indent=pad + " ", break_long_words=False)


def allocated(name: str, how: str, shape: str, dtype: str, device: str) -> str:
    """The host's line that makes a tensor. `how`: "empty" or "zeros"."""
    return f"{name} = torch.{how}({shape}, dtype=torch.{dtype}, device={device})"


def call(targets: Sequence[str], name: str, arguments: Sequence[str]) -> str:
    """A call whose results are bound to names, over as many lines as it takes."""
    text = f"{', '.join(targets)} = {name}({', '.join(arguments)})"
    lines = textwrap.wrap(text, 104, subsequent_indent="    ", break_long_words=False)
    return text if lines[0].endswith("=") else "\n".join(lines)  # a line ends within brackets only


def function(name: str, arguments: Sequence[str], lines: Sequence[str], decorator: str = "@gluon.jit") -> str:
    """A function of the module, from the lines of its body."""
    text = f"def {name}({', '.join(arguments)}):"
    head = "\n".join(textwrap.wrap(text, 112, subsequent_indent=" " * (5 + len(name)), break_long_words=False))
    body = "\n".join("    " + part for line in lines for part in line.split("\n"))
    return f"{decorator}\n{head}\n{body}"


def marked(text: str, mark: str) -> str:
    """A kernel's text with its functions and constants told apart from those of the module's other kernels."""
    functions = "|".join(dict.fromkeys(re.findall(r"^def (\w+)\(", text, re.MULTILINE)))
    constants = "|".join(dict.fromkeys(re.findall(r"^(\w+) = gl\.constexpr\(", text, re.MULTILINE)))
    used = rf"(?<![\w.])({functions})(?=\()|(?<=\()({functions})(?=, \()|(?<=, )({functions})(?=\))"
    text = re.sub(used, lambda m: f"{m[0]}{mark}", text)
    return re.sub(rf"(?<![\w.])({constants})\b", rf"\1{mark}", text)
