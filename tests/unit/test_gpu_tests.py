"""What tests/gpu relies on, read without running it: where there is no GPU none of its tests shows that it is gone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPU_TESTS = ROOT / "tests" / "gpu"
FILES = sorted(GPU_TESTS.rglob("*.py"))
OURS = ("mixtral_run", "benchmarks", "tests")


def path_of(node: ast.AST, file: Path, known: dict[str, Path]) -> Path | None:
    """Return the path that an expression of Path(__file__), parents, constants and known names gives."""
    match node:
        case ast.Name(id=name):
            return known.get(name)
        case ast.Call(func=ast.Name(id="Path"), args=[ast.Name(id="__file__")]):
            return file
        case ast.Attribute(value=base, attr="parent"):
            path = path_of(base, file, known)
            return path and path.parent
        case ast.BinOp(left=left, op=ast.Div(), right=ast.Constant(value=str(word))):
            path = path_of(left, file, known)
            return path and path / word
    return None


def paths_of(file: Path, source: str) -> Iterator[Path]:
    """Yield the paths that a module's constants name."""
    known: dict[str, Path] = {}
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if path := path_of(value, file, known):
                known[name] = path
    yield from known.values()


def missing_imports(source: str) -> Iterator[str]:
    """Yield what a module imports by name from this repository that is not there."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module), names=names, level=0) if module.split(".")[0] in OURS:
                place = ROOT.joinpath(*module.split("."))
                file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
                there = defined_in(file) if file.is_file() else set()
                for each in (alias.name for alias in names):
                    if each not in there and not (place / f"{each}.py").is_file() and not (place / each).is_dir():
                        yield f"{module}.{each}"


def defined_in(file: Path) -> set[str]:
    """Return all names that a module binds; those within its functions and classes count too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.ImportFrom(names=aliases) | ast.Import(names=aliases):
                names |= {alias.asname or alias.name for alias in aliases}
    return names


def test_scripts_are_where_the_tests_start_them() -> None:
    paths = [(file.name, path) for file in FILES for path in paths_of(file, file.read_text())]
    assert len([path for _, path in paths if path.suffix == ".py"]) >= 5
    assert [(name, str(path)) for name, path in paths if not path.exists()] == []


def test_a_script_that_is_gone_is_found() -> None:
    source = 'FOLDER = Path(__file__).parent\nWORKER = FOLDER / "workers" / "gone.py"'
    assert [path.exists() for path in paths_of(GPU_TESTS / "test_it.py", source)] == [True, False]


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(GPU_TESTS)) for file in FILES])
def test_imports_exist(file: Path) -> None:
    assert list(missing_imports(file.read_text())) == []


def test_an_import_that_is_gone_is_found() -> None:
    source = "from mixtral_run.model.norm import RMSNorm, gone\nfrom benchmarks import lora, gone"
    assert list(missing_imports(source)) == ["mixtral_run.model.norm.gone", "benchmarks.gone"]


def test_arguments_of_benches_come_from_their_own_command_lines() -> None:
    """A namespace made by hand lacks each option that a bench gets later."""
    made = [file.name for file in FILES if "Namespace(" in file.read_text().replace("SimpleNamespace(", "")]
    assert made == []
