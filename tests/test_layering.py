"""The package's shape: imports run one way, no Triton where it does not belong, no file too long to read."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "einscade"
LAYERS = ("ir", "passes", "codegen", "runtime", "compiler")  # each may import those before it
LIMIT = 600
SOURCES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path, package_folder: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """(line, module) of everything a file imports, wherever in it; relative imports made absolute."""
    package = path.relative_to(package_folder.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _layer(path: Path) -> str | None:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def test_every_folder_is_a_layer() -> None:
    assert {_layer(path) for path in SOURCES} - {None} <= set(LAYERS)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_run_one_way(path: Path) -> None:
    layer = _layer(path)
    if layer is None:
        return
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    for line, module in _imports(path):
        parts = module.split(".")
        if parts[0] == "einscade" and len(parts) > 1:
            assert parts[1] not in above, f"{_name(path)}:{line}: {layer} imports {module}"


@pytest.mark.parametrize("path", [p for p in SOURCES if _layer(p) in ("ir", "passes")], ids=_name)
def test_ir_and_passes_import_little(path: Path) -> None:
    """sympy, networkx, torch and the standard library; of torch no compiler, no functional library, no Triton."""
    for line, module in _imports(path):
        root = module.split(".")[0]
        allowed = root in ("einscade", "sympy", "networkx", "torch") or root in sys.stdlib_module_names
        assert allowed, f"{_name(path)}:{line}: imports {module}"
        assert not module.startswith(("torch._", "torch.fx", "torch.nn", "torch.compiler")), f"{_name(path)}:{line}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_are_short_or_say_why(path: Path) -> None:
    """A file over the limit must say in its docstring why it has more than "600 lines"."""
    text = path.read_text(encoding="utf-8")
    count = len(text.splitlines())
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert count <= LIMIT or "600 lines" in doc, (
        f"{_name(path)} has {count} lines; split it, or say in its docstring why not"
    )


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text)), f"{_name(path)} has no module docstring"


@pytest.mark.parametrize("path", [p for p in SOURCES if _layer(p) and p.stem != "__init__"], ids=_name)
def test_files_are_in_the_documentation(path: Path) -> None:
    """Its name in code, or as the end of a path."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in (PACKAGE.parent / "docs").glob("*.md"))
    assert re.search(rf"[`/]{path.stem}(\.py)?[`.]", text), f"{_name(path)} is on no page of docs"


def test_the_checks_see_what_they_check(tmp_path: Path) -> None:
    source = tmp_path / "einscade" / "ir" / "x.py"
    source.parent.mkdir(parents=True)
    source.write_text("import triton.language as tl\nfrom einscade import passes\nfrom ..codegen import loops\n")
    found = {module for _, module in _imports(source, tmp_path / "einscade")}
    assert {"triton.language", "einscade.passes", "einscade.codegen.loops"} <= found
