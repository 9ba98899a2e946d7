"""The text form of a cascade: `print_cascade` and `parse_cascade`, inverse to each other.

    cascade attention(Q[b,h,p,e]: bf16, K[b,g,m,e]: bf16, V[b,g,m,f]: bf16) -> O[b,h,p,f]: bf16
      where b < B, h < 32, g < 8, p < P, m < M, e < 128, f < 128
      S[b,h,p,m] = sum(e) 0.125 * K[b,h // 4,m,e] * Q[b,h,p,e]   if m <= p
      G[b,h,p]   = max(m) S[b,h,p,m]
      ...

Grammar, line by line (`#` starts a comment; a line may be broken inside brackets and after a comma):

    header     cascade NAME(tensor, ...) -> tensor, ...       an output may be just its name
    ranks      where RANK < extent [of ORIGIN], ...
    statement  tensor = [reduction] expression [if condition] [along RANK from init]
    tensor     NAME[RANK,...][: DTYPE [KIND(key=value, ...)]]  f32, dense where left out
    reduction  MONOID(RANK, ...)  or  topk(RANK -> SLOT)

Expressions, loosest first: `|`, `&`, `~`, one comparison, `+ -`, `* / // %`, unary `-`, `**`; then numbers, `oo`,
`pi`, `true`, `false`, variables, accesses `K[b,h // 4,m,e]`, functions (`FUNCTIONS` of `expr`, `sqrt`, `Max`, `Min`,
`Where`, `ceil_div`), parentheses. `Name!(...)` is a node that sympy would not build by evaluation, kept as it was.
Nothing in a text is ever evaluated as Python: it may come from anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

import sympy
from sympy.core.relational import Relational
from sympy.core.symbol import Str
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or

from einscade.ir.cascade import DENSE, DTYPES, MONOIDS, Cascade, Einsum, Layout, Rank, Reduction, Scan, Tensor
from einscade.ir.expr import FUNCTIONS, Access, Expr, FloorDiv, Mod, Where, ceil_div, var
from einscade.ir.verify import WORDS, verify

__all__ = ["ParseError", "parse_cascade", "parse_expr", "print_cascade", "print_einsum", "print_expr"]

WIDTH = 120
WIDEST_ALIGNED = 40  # a longer left side does not push the others' `=` to the right

_COMPARISONS: dict[str, Any] = {
    "<=": sympy.Le, ">=": sympy.Ge, "<": sympy.Lt, ">": sympy.Gt, "==": sympy.Eq, "!=": sympy.Ne,
}  # fmt: skip
_CALLS: dict[str, Callable[..., Any]] = {
    **FUNCTIONS, "sqrt": sympy.sqrt, "Max": sympy.Max, "Min": sympy.Min, "Where": Where, "ceil_div": ceil_div,
}  # fmt: skip
_ARITY = {"Where": 3, "ceil_div": 2}
_EXACT: dict[str, Any] = {
    **FUNCTIONS, **{c.__name__: c for c in (
        sympy.Add, sympy.Mul, sympy.Pow, sympy.Max, sympy.Min, FloorDiv, Mod, Where, And, Or, Not,
        sympy.Le, sympy.Ge, sympy.Lt, sympy.Gt, sympy.Eq, sympy.Ne,
    )},
}  # fmt: skip
_EXACT_NAMES = {cls: name for name, cls in _EXACT.items()}
_FUNCTION_NAMES = {cls: name for name, cls in FUNCTIONS.items()}
_COMPARISON_NAMES = {cls: sign for sign, cls in _COMPARISONS.items()}


# ---------------------------------------------------------------------------------------------------------- printing


def print_cascade(cascade: Cascade) -> str:
    """The cascade as text; `parse_cascade` gives an equal cascade back."""
    inputs = [_tensor(t) for t in cascade.inputs]
    outputs = ", ".join(_tensor(cascade.tensors[name]) for name in cascade.outputs)
    header = f"cascade {cascade.name}({', '.join(inputs)}) -> {outputs}"
    if len(header) > WIDTH:
        header = f"cascade {cascade.name}(\n    " + ",\n    ".join(inputs) + f"\n) -> {outputs}"
    lines = [header]
    if cascade.ranks:
        ranks = [f"{r.name} < {print_expr(r.extent)}" + (f" of {r.origin}" if r.origin else "") for r in cascade.ranks]
        lines.append(_filled("  where ", ranks))
    left = [_tensor(e.output) for e in cascade.body]
    width = max((len(text) for text in left if len(text) <= WIDEST_ALIGNED), default=0)
    lines += [f"  {text:<{width}} = {_right(e)}" for text, e in zip(left, cascade.body, strict=True)]
    return "\n".join(lines)


def print_einsum(e: Einsum) -> str:
    """One statement in the syntax of the text form, for comments in generated code."""
    return f"{_tensor(e.output)} = {_right(e)}"


def print_expr(expr: Any) -> str:
    """An expression or condition in the syntax of the text form."""
    return _show(expr, False)[0]


def _right(e: Einsum) -> str:
    text = print_expr(e.expr)
    if e.reduce:
        over = ",".join(e.reduce.ranks)
        text = f"{e.reduce.monoid}({over}{f' -> {e.reduce.slot}' if e.reduce.slot else ''}) {text}"
    if e.domain != sympy.true:
        text += f"   if {print_expr(e.domain)}"
    if e.scan:
        text += f"   along {e.scan.rank} from {print_expr(e.scan.init)}"
    return text


def _tensor(t: Tensor) -> str:
    text = f"{t.name}[{','.join(t.ranks)}]"
    if t.dtype != "f32" or t.layout != DENSE:
        text += f": {t.dtype}"
    if t.layout != DENSE:
        text += f" {t.layout.kind}({', '.join(f'{k}={json.dumps(v)}' for k, v in t.layout.params)})"
    return text


def _filled(start: str, items: list[str]) -> str:
    """Items after `start`, separated by commas, in lines that fit."""
    lines, line = [], start + items[0]
    for item in items[1:]:
        if len(line) + len(item) + 2 > WIDTH:
            lines.append(line + ",")
            line = " " * len(start) + item
        else:
            line += f", {item}"
    return "\n".join([*lines, line])


# How tightly a text binds; a looser one inside a tighter one gets parentheses.
_OR, _AND, _NOT, _COMPARE, _SUM, _PRODUCT, _POWER, _ATOM = range(8)


def _wrapped(node: Any, least: int, compact: bool) -> str:
    text, binds = _show(node, compact)
    return text if binds >= least else f"({text})"


@lru_cache(maxsize=65536)
def _show(node: Any, compact: bool) -> tuple[str, int]:
    """The text of a node and how tightly it binds; `compact`: inside an index, `*` without spaces."""
    if isinstance(node, Access):
        return f"{node.tensor}[{','.join(_show(i, True)[0] for i in node.index)}]", _ATOM
    if isinstance(node, sympy.Symbol):
        return node.name, _ATOM
    if isinstance(node, (BooleanTrue, BooleanFalse)):
        return ("true" if node else "false"), _ATOM
    if node.is_number and (number := _number(node)):
        return number
    if node.func(*node.args) != node:
        name = _EXACT_NAMES.get(node.func, node.func.__name__)
        return f"{name}!({', '.join(_show(a, compact)[0] for a in node.args)})", _ATOM
    if isinstance(node, (Or, And)):
        sign, binds = (" | ", _OR) if isinstance(node, Or) else (" & ", _AND)
        return sign.join(sorted(_wrapped(a, binds + 1, compact) for a in node._argset)), binds
    if isinstance(node, Not):
        return f"~{_wrapped(node.args[0], _ATOM, compact)}", _NOT
    if isinstance(node, Relational):
        a, b = (_wrapped(a, _SUM, compact) for a in node.args)
        return f"{a} {_COMPARISON_NAMES[node.func]} {b}", _COMPARE
    if isinstance(node, sympy.Add):
        return _sum(node, compact)
    if isinstance(node, sympy.Mul):
        return _product(node, compact)
    if isinstance(node, sympy.Pow):
        return _power(node, compact)
    if isinstance(node, FloorDiv) and node.args[1].is_Integer and node.args[0].is_Add:
        a, b = node.args
        if (b - 1) in a.args and b > 1 and ceil_div(a - b + 1, b) == node:
            return f"ceil_div({_show(a - b + 1, compact)[0]}, {b})", _ATOM
    if isinstance(node, (FloorDiv, Mod)):
        a, b = (_wrapped(a, _POWER, compact) for a in node.args)
        return f"{a} {'//' if isinstance(node, FloorDiv) else '%'} {b}", _PRODUCT
    name = _FUNCTION_NAMES.get(node.func) or node.func.__name__
    return f"{name}({', '.join(_show(a, compact)[0] for a in node.args)})", _ATOM


def _number(node: Any) -> tuple[str, int] | None:
    if node.is_Float:
        text = repr(float(node))
    elif node.is_Rational or node in (sympy.oo, -sympy.oo, sympy.pi):
        text = str(node)
    elif node == sympy.E:
        return "exp(1)", _ATOM
    else:
        return None
    return text, _SUM if text[0] == "-" else _PRODUCT if "/" in text else _ATOM


def _sum(node: Any, compact: bool) -> tuple[str, int]:
    """Numbers last, what is subtracted after what is added; `FloorDiv(a - 1, b) + 1` as `ceil_div(a, b)`."""
    terms, number = [], 0
    for term in node.args:
        if term.is_Integer:
            number = int(term)
        else:
            terms.append(term)
    ceiling = next((t for t in terms if number > 0 and isinstance(t, FloorDiv) and _as_ceiling(t)), None)
    texts = []
    if ceiling is not None:
        terms.remove(ceiling)
        number -= 1
        a, b = ceiling.args
        texts.append(f"ceil_div({_show(a + 1, compact)[0]}, {_show(b, compact)[0]})")
    subtracted = []
    for term in sorted(terms, key=lambda t: not t.is_Mul) if compact else terms:
        if term.could_extract_minus_sign() and (term.is_Number or (term.is_Mul and term.args[0].is_number)):
            text, binds = _show(-term, compact)
            subtracted.append(text if binds > _SUM else f"({text})")
        else:
            texts.append(_wrapped(term, _PRODUCT, compact))
    if number > 0:
        texts.append(str(number))
    elif number < 0:
        subtracted.append(str(-number))
    if not texts:
        texts = ["-" + subtracted.pop(0)]
    text = " + ".join(texts) + "".join(f" - {t}" for t in subtracted)
    return text, _SUM if len(texts) + len(subtracted) > 1 or text[0] == "-" else _ATOM


def _as_ceiling(node: Any) -> bool:
    """Whether adding 1 to this FloorDiv makes what `ceil_div` builds."""
    a, b = node.args
    return ceil_div(a + 1, b) == node + 1


def _product(node: Any, compact: bool) -> tuple[str, int]:
    """Coefficient first, then factors, then `/` and each divisor."""
    sign, over, under = "", [], []
    for factor in node.args:
        if factor.is_Rational or factor.is_Float:
            if factor.is_negative:
                sign, factor = "-", -factor
            if factor.is_Float or factor.p != 1:
                over.append(_show(factor if factor.is_Float else sympy.Integer(factor.p), compact)[0])
            if factor.is_Rational and factor.q != 1:
                under.append(str(factor.q))
        elif factor.is_Pow and factor.exp.is_Rational and factor.exp.is_negative:
            under.append(_wrapped(factor.base**-factor.exp, _POWER, compact))
        else:
            over.append(_wrapped(factor, _POWER, compact))
    tight = compact or not any("[" in text for text in over + under)
    if tight:  # numbers, rank variables, extents: m1*M0
        over.sort(key=str.swapcase)
    text = sign + ("*" if tight else " * ").join(over or ["1"]) + "".join(f" / {d}" for d in under)
    return text, _SUM if sign else _PRODUCT


def _power(node: Any, compact: bool) -> tuple[str, int]:
    base, exponent = node.args
    if exponent.is_Rational and exponent.is_negative:
        return f"1 / {_wrapped(base**-exponent, _POWER, compact)}", _PRODUCT
    if exponent == sympy.Rational(1, 2):
        return f"sqrt({_show(base, compact)[0]})", _ATOM
    return f"{_wrapped(base, _ATOM, compact)}**{_wrapped(exponent, _ATOM, compact)}", _POWER


# ----------------------------------------------------------------------------------------------------------- parsing


class ParseError(ValueError):
    """A text that is no cascade: the message shows the line and column."""

    def __init__(self, message: str, text: str, position: int) -> None:
        before = text[:position]
        self.line, self.column = before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1
        source = text.split("\n")[self.line - 1]
        super().__init__(f"line {self.line}, column {self.column}: {message}\n  {source}\n  {' ' * (self.column - 1)}^")


def parse_cascade(text: str) -> Cascade:
    """The cascade of a text, verified. Raises `ParseError`, or `CascadeError` where the cascade breaks a rule."""
    cascade = _run(text, lambda p: p.cascade())
    verify(cascade, where="parsing")
    return cascade


def parse_expr(text: str) -> Any:
    """One expression or condition of the text form (not verified). Raises `ParseError`."""
    return _run(text, lambda p: p.whole(p.condition))


def _run(text: str, rule: Callable[[_Parser], Any]) -> Any:
    parser = _Parser(text)
    try:
        return rule(parser)
    except RecursionError:
        raise ParseError("nested too deeply", text, parser.position) from None
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        if isinstance(error, ParseError):
            raise
        # sympy refuses what is no expression (a boolean in a sum, an unordered comparison) in several ways.
        raise ParseError(f"not an expression: {error}", text, parser.position) from error


_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r]+|\#[^\n]*)
      | (?P<line>\n)
      | (?P<float>\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)
      | (?P<int>\d+)
      | (?P<name>[A-Za-z_][A-Za-z_0-9]*(?:!(?=\())?)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<sign>->|\*\*|//|<=|>=|==|!=|[-+*/%()\[\]<>&|~=,:])""",
    re.VERBOSE,
)
_LARGEST_POWER = 4096  # bits of a power of numbers: more is a mistake, or an attack


class _Parser:
    """Recursive descent over a list of tokens; `kind`, `value` and `position` are the next token's."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.at = text, _tokens(text), 0

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    @property
    def value(self) -> str:
        return self.tokens[self.at][1]

    @property
    def position(self) -> int:
        return self.tokens[self.at][2]

    def fail(self, expected: str) -> NoReturn:
        found = {"line": "the end of the line", "end": "the end"}.get(self.kind, repr(self.value))
        raise ParseError(f"expected {expected}, found {found}", self.text, self.position)

    def take(self, *values: str) -> str | None:
        """The next token's text if it is one of these signs or words, else None and nothing is read."""
        if self.kind in ("sign", "name") and self.value in values:
            self.at += 1
            return self.tokens[self.at - 1][1]
        return None

    def need(self, value: str) -> None:
        if not self.take(value):
            self.fail(repr(value))

    def name(self, what: str) -> str:
        if self.kind != "name" or self.value.endswith("!") or self.value in WORDS:
            self.fail(what)
        self.at += 1
        return self.tokens[self.at - 1][1]

    def several(self, rule: Callable[[], Any], close: str | None = None) -> tuple[Any, ...]:
        """Items between commas, up to `close` (which may come at once) where one is given."""
        if close and self.take(close):
            return ()
        items = [rule()]
        while self.take(","):
            items.append(rule())
        if close:
            self.need(close)
        return tuple(items)

    def whole(self, rule: Callable[[], Any]) -> Any:
        result = rule()
        if self.kind != "end":
            self.fail("the end")
        return result

    # -- the cascade --

    def cascade(self) -> Cascade:
        self.lines()
        self.need("cascade")
        name = self.name("the cascade's name")
        self.need("(")
        inputs = self.several(self.tensor, ")")
        self.need("->")
        start = self.at
        outputs = self.several(self.output)
        ends = self.at
        self.end_of_line()
        ranks: tuple[Rank, ...] = ()
        if self.take("where"):
            ranks = self.several(self.rank)
            self.end_of_line()
        declared = {t.name: t for t, typed in outputs if typed}
        body = []
        while self.kind != "end":
            body.append(self.statement(declared))
            self.end_of_line()
        cascade = Cascade(name, ranks, inputs, tuple(t.name for t, _ in outputs), tuple(body))
        self.at = start
        for t in declared.values():
            if cascade.tensors.get(t.name, t) != t:
                raise ParseError(f"output {_tensor(t)} is defined as {_tensor(cascade.tensors[t.name])}", self.text,
                                 self.position)  # fmt: skip
        self.at = ends
        return cascade

    def lines(self) -> None:
        while self.kind == "line":
            self.at += 1

    def end_of_line(self) -> None:
        if self.kind not in ("line", "end"):
            self.fail("the end of the line")
        self.lines()

    def output(self) -> tuple[Tensor, bool]:
        """A tensor, and whether more than its name was given."""
        if self.kind == "name" and self.tokens[self.at + 1][1] != "[":
            return Tensor(self.name("an output"), ()), False
        return self.tensor(), True

    def tensor(self) -> Tensor:
        return self.typed(self.head())

    def head(self) -> tuple[str, tuple[str, ...]]:
        name = self.name("a tensor's name")
        self.need("[")
        return name, self.several(lambda: self.name("a rank"), "]")

    def typed(self, head: tuple[str, tuple[str, ...]]) -> Tensor:
        dtype, layout = "f32", DENSE
        if self.take(":"):
            if self.value not in DTYPES:
                self.fail(f"a dtype ({', '.join(DTYPES)})")
            dtype = self.name("a dtype")
            if self.kind == "name" and self.value not in WORDS:
                kind = self.name("a layout")
                self.need("(")
                layout = Layout(kind, self.several(self.parameter, ")"))
        return Tensor(*head, dtype, layout)

    def parameter(self) -> tuple[str, str | int]:
        key = self.name("a parameter's name")
        self.need("=")
        if self.kind == "string":
            value: str | int = json.loads(self.value)
        else:
            negative = self.take("-")
            if self.kind != "int":
                self.fail("an integer or a string")
            value = -int(self.value) if negative else int(self.value)
        self.at += 1
        return key, value

    def rank(self) -> Rank:
        name = self.name("a rank")
        self.need("<")
        extent = self.sum()
        return Rank(name, extent, self.name("the rank it is a part of") if self.take("of") else None)

    def statement(self, declared: dict[str, Tensor]) -> Einsum:
        """`declared` are the header's outputs: one that has no type here has the header's."""
        head = self.head()
        output = declared.get(head[0], Tensor(*head))
        output = self.typed(head) if self.value == ":" or output.ranks != head[1] else output
        self.need("=")
        reduce = self.reduction()
        expr = self.condition()
        domain = self.condition() if self.take("if") else sympy.true
        scan = None
        if self.take("along"):
            rank = self.name("a rank")
            self.need("from")
            scan = Scan(rank, self.condition())
        return Einsum(output, expr, reduce, domain, scan)

    def reduction(self) -> Reduction | None:
        if self.kind != "name" or self.tokens[self.at + 1][1] != "(":
            return None
        if self.take("topk"):
            self.need("(")
            rank = self.name("a rank")
            self.need("->")
            slot = self.name("a rank")
            self.need(")")
            return Reduction("topk", (rank,), slot)
        if (monoid := self.take(*MONOIDS)) is None:
            return None
        self.need("(")
        return Reduction(monoid, self.several(lambda: self.name("a rank"), ")"))

    # -- expressions, loosest binding first --

    def condition(self) -> Any:
        return self.chain(self.conjunction, "|", Or)

    def conjunction(self) -> Any:
        return self.chain(self.negation, "&", And)

    def chain(self, rule: Callable[[], Any], sign: str, build: Any) -> Any:
        items = [rule()]
        while self.take(sign):
            items.append(rule())
        return items[0] if len(items) == 1 else build(*items)

    def negation(self) -> Any:
        return Not(self.negation()) if self.take("~") else self.comparison()

    def comparison(self) -> Any:
        left = self.sum()
        sign = self.take(*_COMPARISONS)
        return _COMPARISONS[sign](left, self.sum()) if sign else left

    def sum(self) -> Any:
        terms = [self.product()]
        while sign := self.take("+", "-"):
            term = self.product()
            terms.append(-term if sign == "-" else term)
        return terms[0] if len(terms) == 1 else sympy.Add(*terms)

    def product(self) -> Any:
        # A leading sign is a factor of the whole product: negating a sum here would multiply it out.
        factors = [sympy.Integer(-1)] if self.take("-") else []
        factors.append(self.unary())
        while sign := self.take("*", "/", "//", "%"):
            factor = self.unary()
            if sign in ("//", "%"):
                factors = [(FloorDiv if sign == "//" else Mod)(sympy.Mul(*factors), factor)]
            else:
                factors.append(sympy.Pow(factor, -1) if sign == "/" else factor)
        return factors[0] if len(factors) == 1 else sympy.Mul(*factors)

    def unary(self) -> Any:
        return -self.unary() if self.take("-") else self.power()

    def power(self) -> Any:
        base = self.atom()
        if not self.take("**"):
            return base
        start, exponent = self.position, self.unary()
        if base.is_Rational and exponent.is_Rational:
            bits = max(abs(base.p), base.q).bit_length()
            if bits * abs(exponent) > _LARGEST_POWER:
                raise ParseError("a power of numbers this large", self.text, start)
        return sympy.Pow(base, exponent)

    def atom(self) -> Any:
        kind, value = self.kind, self.value
        if kind == "int":
            self.at += 1
            return sympy.Integer(int(value))
        if kind == "float":
            self.at += 1
            return sympy.Float(float(value))
        if self.take("("):
            inner = self.condition()
            self.need(")")
            return inner
        for word, constant in (("oo", sympy.oo), ("pi", sympy.pi), ("true", sympy.true), ("false", sympy.false)):
            if self.take(word):
                return constant
        if kind != "name":
            self.fail("an expression")
        follows = self.tokens[self.at + 1][1]
        if follows == "(":
            return self.call(value)
        name = self.name("an expression")
        if not self.take("["):
            return var(name)
        return Access(Str(name), *self.several(self.sum, "]"))

    def call(self, name: str) -> Expr:
        """A function by its name, or, with `!`, a node as it stands."""
        exact = name.endswith("!")
        function = (_EXACT if exact else _CALLS).get(name.removesuffix("!"))
        if function is None:
            self.fail(f"a function ({', '.join(sorted(_CALLS))})")
        start = self.position
        self.at += 2
        args = self.several(self.condition, ")")
        count = _ARITY.get(name, 1 if name in FUNCTIONS or name == "sqrt" else None)
        if not args or (count is not None and len(args) != count):
            raise ParseError(f"{name} takes {count or 'some'} arguments, not {len(args)}", self.text, start)
        return function(*args, evaluate=False) if exact else function(*args)


def _tokens(text: str) -> list[tuple[str, str, int]]:
    """(kind, text, position) of every token; no line ends inside brackets and after commas."""
    tokens: list[tuple[str, str, int]] = []
    position = depth = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ParseError(f"unexpected character {text[position]!r}", text, position)
        kind, value = match.lastgroup or "", match.group()
        position = match.end()
        if value in ("(", "["):
            depth += 1
        elif value in (")", "]"):
            depth -= 1
        if kind == "skip" or (kind == "line" and (depth > 0 or (tokens and tokens[-1][1] == ","))):
            continue
        tokens.append((kind, value, match.start()))
    return [*tokens, ("end", "", len(text)), ("end", "", len(text))]
