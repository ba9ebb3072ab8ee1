"""The shape of the package, as a table that fails when an arrow points the wrong way.

Knows source text only: everything here is read from the syntax tree, nothing is imported.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qwen_ray"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# part -> (parts of ours, third-party packages) that it may import, the standard library aside. A part is a folder or
# a single file of qwen_ray; "__init__" is the public door. Under a folder, a name of its own is always allowed.
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "core": (set(), set()),
    "kernels": (set(), {"torch", "triton"}),
    "planner": ({"core"}, set()),
    "engine": ({"core"}, set()),
    "text": ({"core"}, {"tokenizers", "jinja2", "gguf"}),
    "grammar": ({"core", "text"}, {"llguidance"}),
    "source": ({"core"}, {"huggingface_hub", "gguf"}),
    "api_keys": ({"core"}, {"pydantic", "yaml"}),
    "config": ({"core", "api_keys"}, {"pydantic", "yaml"}),
    "metrics": ({"core"}, {"prometheus_client"}),
    "parallel": ({"core"}, {"torch"}),
    "layers": ({"core", "parallel", "kernels"}, {"torch"}),
    "models": ({"core", "layers"}, {"torch"}),
    "worker": (
        {"core", "grammar", "parallel", "kernels", "layers", "models"},
        {"torch", "safetensors", "gguf", "numpy"},
    ),
    "doctor": ({"core", "kernels", "parallel", "machine", "cluster"}, {"torch"}),
    "cluster": ({"core", "worker"}, {"ray", "msgspec"}),
    "tracing": (set(), {"opentelemetry"}),
    "machine": ({"core"}, set()),
    "sizing": ({"core", "config", "planner"}, set()),
    "llm": (
        {"core", "config", "machine", "sizing", "planner", "text", "grammar", "source", "engine", "worker"},
        set(),
    ),
    "serving": (
        {
            "core",
            "config",
            "api_keys",
            "sizing",
            "planner",
            "text",
            "grammar",
            "source",
            "engine",
            "cluster",
            "metrics",
            "tracing",
        },
        {"ray", "fastapi", "starlette", "pydantic", "pydantic_core", "msgspec"},
    ),
    "commands": (
        {"core", "config", "api_keys", "machine", "sizing", "planner", "source", "llm", "doctor", "serving"},
        {"typer", "rich", "httpx", "pydantic", "yaml"},
    ),
    "cli": ({"core", "config", "machine", "commands", "serving"}, {"typer", "rich"}),
    "__init__": ({"core", "config", "llm"}, set()),
    "__main__": ({"cli"}, set()),
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "base", "impl", "misc", "common"}
# The command line starts fast because a command imports what it needs when it runs; kernels are chosen by device; the
# public names are looked up on first use, so that `import qwen_ray` does not import torch.
LAZY_IMPORTS_ALLOWED = {"cli.py", "kernels/registry.py", "serving/launch.py", "__init__.py"}
ENVIRONMENT_ALLOWED = {"config.py"}

MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    """The row of the table that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names that a tree imports, with their lines; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the whole name"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def module_named(dotted: str) -> Path | None:
    """The file of ours that `qwen_ray.a.b.name` is defined in, or None."""
    parts = dotted.split(".")[1:]
    for length in range(len(parts), -1, -1):
        base = PACKAGE.joinpath(*parts[:length])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path in TREES:
                return path
    return None


def test_every_part_has_a_row_in_the_table() -> None:
    assert {part_of(path) for path in MODULES} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_follow_the_table(part: str) -> None:
    ours, third_party = MAY_IMPORT[part]
    wrong: list[str] = []
    for path in MODULES:
        if part_of(path) != part:
            continue
        for name, line in imports(TREES[path]):
            top, *below = name.split(".")
            if top == "qwen_ray":
                target = below[0] if below else "__init__"
                if (
                    target not in ours | {part}
                    and (PACKAGE / target).with_suffix(".py").exists() | (PACKAGE / target).is_dir()
                ):
                    wrong.append(f"{relative(path)}:{line} imports {name}")
            elif top not in sys.stdlib_module_names | third_party:
                wrong.append(f"{relative(path)}:{line} imports {name}")
    assert wrong == []


def test_no_cycles_among_modules() -> None:
    arrows = {
        path: {
            target
            for name, _ in imports(TREES[path])
            if name.startswith("qwen_ray.") and (target := module_named(name)) and target.name != "__init__.py"
        }
        for path in MODULES
        if path.name != "__init__.py"
    }
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " -> ".join(relative(p) for p in (*trail[trail.index(path) :], path))
        if path not in done:
            for target in arrows[path]:
                visit(target, (*trail, path))
            done.add(path)

    for path in arrows:
        visit(path, ())


@pytest.mark.parametrize("folder", ["qwen_ray", "tests", "benchmarks", "observability"])
def test_files_and_functions_are_short(folder: str) -> None:
    long: list[str] = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        if (count := len(text.splitlines())) > MAX_FILE_LINES:
            long.append(f"{name}: {count} lines")
        for function in functions(ast.parse(text)):
            if (count := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES:
                long.append(f"{name}:{function.lineno} {function.name}: {count} lines")
    assert long == []


def test_every_function_is_annotated() -> None:
    bare: list[str] = []
    for path, tree in TREES.items():
        for function in functions(tree):
            spec = function.args
            arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
            if arguments and arguments[0].arg in ("self", "cls"):
                arguments = arguments[1:]
            arguments += [argument for argument in (spec.vararg, spec.kwarg) if argument]
            if function.returns is None or any(argument.annotation is None for argument in arguments):
                bare.append(f"{relative(path)}:{function.lineno} {function.name}")
    assert bare == []


def test_no_global_statement() -> None:
    found = [
        f"{relative(path)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]
    assert found == []


def test_imports_stand_at_the_top() -> None:
    lazy = [
        f"{relative(path)}:{line} imports {name}"
        for path, tree in TREES.items()
        if relative(path) not in LAZY_IMPORTS_ALLOWED
        for function in functions(tree)
        for name, line in imports(function)
    ]
    dynamic = [
        f"{relative(path)}:{node.lineno} {node.attr}"
        for path, tree in TREES.items()
        if relative(path) not in LAZY_IMPORTS_ALLOWED
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("import_module", "__import__")
    ]
    assert lazy + dynamic == []


def test_only_config_touches_the_environment() -> None:
    found: list[str] = []
    for path, tree in TREES.items():
        if relative(path) in ENVIRONMENT_ALLOWED:
            continue
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
            if name in ("environ", "environb", "getenv", "putenv"):
                found.append(f"{relative(path)}:{getattr(node, 'lineno', 0)} {name}")
    assert found == []


def test_names_and_depth() -> None:
    for path in MODULES:
        parts = Path(relative(path)).parts
        assert not {part.removesuffix(".py").strip("_") for part in parts} & FORBIDDEN_NAMES, path
        assert len(parts) <= 3, f"{path}: more than two folder levels"


def test_inner_init_files_are_empty() -> None:
    inner = [path for path in MODULES if path.name == "__init__.py" and path.parent != PACKAGE]
    assert [relative(path) for path in inner if path.read_text(encoding="utf-8").strip()] == []


def test_every_module_opens_with_a_docstring() -> None:
    bare = [relative(path) for path, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
    assert bare == []
