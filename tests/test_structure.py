"""The shape of the code: which way imports go, who may do what, and how long things may be."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import time
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

PACKAGE = ROOT / "disttrain"
FILES = sorted(PACKAGE.rglob("*.py"))

# A part may import itself and the parts it names here; a part is a package or a single module.
FOUNDATION = {"errors", "files", "randomness", "schema", "config", "config_file", "manifest"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "randomness": set(),
    "schema": {"errors", "files"},
    "config": set(),
    "config_file": {"errors", "schema", "config"},
    "manifest": {"errors", "files", "schema", "config", "config_file"},
    "prompts": FOUNDATION,
    "cluster": FOUNDATION,
    "data": FOUNDATION | {"prompts"},
    "models": FOUNDATION | {"prompts"},
    "formats": FOUNDATION | {"prompts", "data", "models"},
    "methods": FOUNDATION | {"prompts", "data", "models", "formats"},
    "engine": FOUNDATION | {"prompts", "data", "models", "formats", "methods"},
}
ALLOWED |= {part: set(ALLOWED) for part in ("review", "merge")}
ALLOWED["cli"] = set(ALLOWED)
ALLOWED["__main__"] = {"cli"}
ALLOWED["__init__"] = set()


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a tree imports, wherever in it, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written from the root"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute or name, else nothing."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def uses(tree: ast.AST, *modules: str) -> set[str]:
    """Imports of these modules (or what is in them) and attributes reached through them."""
    reached = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {*imported(tree), *reached}
    return {
        found
        for found in names
        if any(found == module or found.startswith(f"{module}.") for module in modules)
    }


def upward(source: ast.AST, part: str) -> list[str]:
    """Imports that a file of `part` must not make."""
    found = []
    for target in imported(source):
        root, _, rest = target.partition(".")
        wanted = rest.split(".")[0]
        if root == "disttrain" and wanted in ALLOWED and wanted != part:
            if wanted not in ALLOWED[part]:
                found.append(target)
        elif root == "disttrain" and wanted not in ALLOWED and wanted != "__version__":
            found.append(target)
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_downwards(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"a new part needs its place in the table: {part}"
    assert upward(parsed(path), part) == []


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("data", "from disttrain.models.base import load_base"),
        ("models", "from disttrain.data import images"),
        ("formats", "from disttrain.methods import METHODS"),
        ("methods", "from disttrain.engine.pack import Pack"),
        ("engine", "def late():\n    import disttrain.review.sample"),
        ("engine", "from disttrain import cli"),
        ("prompts", "from disttrain import data"),
        ("config", "from disttrain.prompts import PromptPlan"),
        ("files", "from disttrain import config"),
        ("errors", "from disttrain import files"),
        ("engine", "from disttrain.unknown import thing"),
    ],
)
def test_the_layering_test_sees_upward_imports(part: str, line: str) -> None:
    assert upward(ast.parse(line), part)


def test_methods_know_nothing_of_each_other() -> None:
    methods = {"dreambooth", "lora", "textual_inversion"}
    for method in methods:
        found = set(imported(parsed(PACKAGE / f"methods/{method}.py")))
        others = tuple(f"disttrain.methods.{other}" for other in methods - {method})
        assert not [target for target in found if target.startswith(others)]


# What only one module may do: the modules it may not name elsewhere, and who may.
OWNED = [
    (("PIL",), {"disttrain/data/images.py"}),
    (
        ("os.replace", "os.rename", "os.renames", "shutil.move", "os.link"),
        {"disttrain/files.py"},
    ),
    (("hashlib",), {"disttrain/files.py", "disttrain/randomness.py"}),
    (("fcntl",), {"disttrain/files.py"}),
    (
        ("accelerate", "torch.distributed"),
        {
            "disttrain/engine/distributed.py",
            "disttrain/engine/fully_sharded.py",
            "disttrain/models/parts.py",
        },
    ),
    (("deepspeed",), {"disttrain/engine/zero.py"}),
    (
        (
            "random",
            "secrets",
            "numpy.random",
            "np.random",
            "torch.manual_seed",
            "torch.seed",
            "torch.Generator",
            "torch.rand",
            "torch.randn",
            "torch.randint",
            "torch.randperm",
            "torch.rand_like",
            "torch.randn_like",
            "torch.normal",
            "torch.bernoulli",
            "torch.multinomial",
        ),
        {"disttrain/randomness.py"},
    ),
    (
        ("argparse",),
        {
            "disttrain/cli.py",
            "disttrain/cluster/commands.py",
            "disttrain/review/commands.py",
        },
    ),
    (
        ("signal",),
        {
            "disttrain/engine/preemption.py",
            "disttrain/data/loader.py",
            "disttrain/cluster/supervise.py",
        },
    ),
]


@pytest.mark.parametrize(("modules", "owners"), OWNED, ids=[row[0][0] for row in OWNED])
def test_only_its_owner_does_it(modules: tuple[str, ...], owners: set[str]) -> None:
    users = {name(path) for path in FILES if uses(parsed(path), *modules)}
    assert users == owners


def test_parts_takes_only_the_empty_weights_from_accelerate() -> None:
    found = uses(parsed(PACKAGE / "models/parts.py"), "accelerate", "torch.distributed")
    assert found == {"accelerate.init_empty_weights"}


def test_fully_sharded_splits_tensors_and_sends_nothing_itself() -> None:
    found = uses(parsed(PACKAGE / "engine/fully_sharded.py"), "accelerate", "torch.distributed")
    assert {word.rpartition(".")[0] for word in found} <= {
        *("torch", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.tensor"),
    }


def test_randomness_hashes_only_its_keys() -> None:
    found = uses(parsed(PACKAGE / "randomness.py"), "hashlib")
    assert found == {"hashlib", "hashlib.blake2b"}


def renames(tree: ast.AST) -> list[int]:
    """Lines with `path.rename(...)`, or `path.replace(one argument)`, which for text takes two."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            node.func.attr == "rename"
            or (node.func.attr == "replace" and len(node.args) + len(node.keywords) == 1)
        )
    ]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_path_is_renamed_by_its_method(path: Path) -> None:
    assert renames(parsed(path)) == []


def test_the_rename_test_sees_renames() -> None:
    lines = "a.rename(b)\na.b().replace(c)\nx.replace('a', 'b')\nreplace(a, name=b)"
    assert renames(ast.parse(lines)) == [1, 2]


def test_light_modules_load_nothing_heavy() -> None:
    light = ["cli", "config", "errors", "files", "prompts", "randomness", "schema"]
    imports = "".join(f"import disttrain.{module}\n" for module in light)
    assert heavy_after(imports) == "[]"
    assert heavy_after("import disttrain.models.packed") == "['torch']"


def heavy_after(script: str) -> str:
    """Which heavy packages a process holds after running `script`."""
    names = "{'torch', 'diffusers', 'transformers', 'accelerate', 'rich', 'PIL', 'safetensors'}"
    shown = f"\nimport sys\nprint(sorted({names} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script + shown],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


# Lengths.


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: not blank, not only comment, not docstring."""
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
        tokenize.ENCODING,
    }
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_the_loop_fits_one_screen() -> None:
    path = PACKAGE / "engine/train.py"
    source = path.read_text()
    assert len(code_lines(source)) <= 70
    found = {node.name: length(node) for node in functions(parsed(path))}
    assert {"train", "train_pack"} <= found.keys()
    assert found["train"] + found["train_pack"] <= 70


def test_code_lines_are_counted() -> None:
    source = (
        '"""One\ntwo."""\n\nx = 1  # why\n# alone\ny = """a\nb"""\ndef f():\n    """D."""\n    z\n'
    )
    assert sorted(code_lines(source)) == [4, 6, 7, 8, 10]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_under_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400


def test_functions_are_under_60_lines() -> None:
    long = [
        f"{name(path)}:{node.lineno} {node.name}: {length(node)}"
        for path in FILES
        for node in functions(parsed(path))
        if length(node) >= 60
    ]
    assert long == []


# Said of itself.


def is_private(text: str) -> bool:
    return text.startswith("_") and not text.endswith("__")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_modules_and_public_names_say_what_they_are(path: Path) -> None:
    tree = parsed(path)
    if not tree.body:
        return
    assert ast.get_docstring(tree)
    silent = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not is_private(node.name):
            inside = node.body if isinstance(node, ast.ClassDef) else []
            public = [
                part
                for part in inside
                if isinstance(part, ast.FunctionDef)
                and not part.name.startswith("_")
                and part.name != "forward"
            ]
            silent += [part.name for part in (node, *public) if not ast.get_docstring(part)]
    assert silent == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_error_is_swallowed_unseen(path: Path) -> None:
    """No bare or broad `except` that does not raise again."""
    broad = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler):
            kinds = {dotted(part) for part in ast.walk(node.type)} if node.type else set()
            again = any(isinstance(part, ast.Raise) for part in ast.walk(node))
            if node.type is None or (kinds & {"Exception", "BaseException"} and not again):
                broad.append(node.lineno)
    assert broad == []


# Speed.


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    command = [sys.executable, "-m", "disttrain", "--help"]
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=True
        )
        best = min(best, time.perf_counter() - started)
    assert "usage: disttrain" in done.stdout
    assert best < 0.3
    parse = (
        "from disttrain.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    )
    assert heavy_after(parse) == "[]"
