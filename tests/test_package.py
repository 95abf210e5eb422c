"""The package as a whole: what it exports, what it loads, which module may know which, and what it never contains."""

import ast
import builtins
import inspect
import io
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support import run_python

import blockstore as bs
from blockstore import errors

PACKAGE = Path(bs.__file__).parent
PROJECT = PACKAGE.parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path.read_text(
        encoding="utf-8"
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}

every_module = pytest.mark.parametrize("module", list(SOURCES))

# -- what importing it loads ----------------------------------------------------------------------

LOADED = """
import sys
import numpy
before = set(sys.modules)
import {module}
allowed = sys.stdlib_module_names | {{"numpy", "blockstore"}}
allowed |= {{name for name in sys.modules if name.startswith("_sysconfigdata_")}}  # of the build, so not listed
print(sorted(name for name in set(sys.modules) - before if name.partition(".")[0] not in allowed))
print(sorted({{"asyncio", "multiprocessing", "concurrent.futures", "trio", "argparse"}} & set(sys.modules) - before))
"""


def test_importing_it_loads_numpy_and_the_standard_library_and_nothing_slow_of_that() -> None:
    ran = run_python(LOADED.format(module="blockstore"))

    assert (ran.stdout, ran.stderr) == ("[]\n[]\n", "")


@pytest.mark.parametrize("optional", ["asyncio", "tqdm"])
def test_a_module_that_loads_more_is_caught_by_the_same_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optional: str
) -> None:
    (tmp_path / "greedy.py").write_text(f"import {optional}\n", encoding="utf-8")
    (tmp_path / "tqdm.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    ran = run_python(LOADED.format(module="greedy"))

    assert f"'{optional}'" in ran.stdout, ran.stderr


def test_nothing_but_checksums_and_the_command_line_needs_an_optional_package() -> None:
    optional = {name: imported_tops(text) - stdlib_and_numpy() for name, text in SOURCES.items()}

    needed = {name: tops for name, tops in optional.items() if tops}
    assert needed.pop("demo") <= {"PIL", "numpy", "skimage", "zarr"}
    assert needed.pop("cli", set()) <= {"tqdm"}
    assert needed == {"checksums": {"crc32c", "xxhash"}, "dask": {"dask"}, "fill": {"tqdm"}}


def imported_tops(text: str) -> set[str]:
    """Return the top-level packages that a source imports, anywhere in it."""
    tops = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            tops |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            tops.add((node.module or "").partition(".")[0])
    return tops


def stdlib_and_numpy() -> set[str]:
    return set(sys.stdlib_module_names) | {"numpy", "blockstore"}


# -- what it exports ------------------------------------------------------------------------------


def test_all_is_sorted_and_names_nothing_twice() -> None:
    assert bs.__all__ == sorted(set(bs.__all__))


def test_every_name_in_all_is_there() -> None:
    assert [name for name in bs.__all__ if not hasattr(bs, name)] == []


def test_every_public_name_is_in_all() -> None:
    public = {name for name, value in vars(bs).items() if name[0] != "_" and not isinstance(value, ModuleType)}

    assert public == set(bs.__all__)


def documented() -> Iterator[tuple[str, str | None]]:
    """Yield each function, class, method and property that `__all__` leads to, and its docstring."""
    for name in bs.__all__:
        exported = getattr(bs, name)
        if not isinstance(exported, type):
            if callable(exported):
                yield name, exported.__doc__
            continue
        yield name, exported.__doc__
        for cls in exported.__mro__:
            for member, value in vars(cls).items() if cls.__module__.partition(".")[0] == "blockstore" else ():
                if member[0] != "_" and (callable(value) or isinstance(value, property | staticmethod | classmethod)):
                    yield f"{name}.{member}", inspect.getdoc(getattr(exported, member))


def test_all_that_is_public_has_a_docstring() -> None:
    assert [name for name, text in documented() if not text] == []


@pytest.mark.parametrize(
    "name", ["create", "BlockStore", "BlockStore.flush", "AllocatedRange.start", "SequentialAllocator.free"]
)
def test_the_search_for_docstrings_finds(name: str) -> None:
    assert name in dict(documented())


def test_it_is_packed_with_the_mark_that_says_it_is_typed() -> None:
    setuptools = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packed = {path.name for pattern in setuptools["package-data"]["blockstore"] for path in PACKAGE.glob(pattern)}

    assert "py.typed" in packed


def test_every_folder_with_modules_is_packed() -> None:
    setuptools = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(PROJECT) for path in PACKAGE.rglob("*.py")}

    assert set(setuptools["packages"]) == {".".join(folder.parts) for folder in folders}


# -- the tree of errors ---------------------------------------------------------------------------

BRANCH = re.compile(r"([│ ]*)[├└]── (\w+) +(?:([\w.]+(?:Error|Operation|Group))(?:\(\w+\))?  )?")
ROOT = re.compile(r"(\w+)\((\w+)\)$")


def drawn_tree(docstring: str) -> dict[str, list[str]]:
    """Return the bases of each error, as the docstring draws them."""
    tree: dict[str, list[str]] = {}
    path: list[str] = []
    for line in docstring.splitlines():
        text = line.strip() if ROOT.match(line.strip()) else line.removeprefix("    ")
        if found := ROOT.match(text):
            path = [found[1]]
            tree[found[1]] = [found[2]]
        elif found := BRANCH.match(text):
            depth = len(found[1]) // 4 + 1
            path[depth:] = [found[2]]
            tree[found[2]] = [path[depth - 1], *filter(None, [found[3]])]
    return tree


def defined() -> dict[str, type[BaseException]]:
    """Return the exceptions that `blockstore.errors` defines."""
    classes = [node.name for node in ast.parse(SOURCES["errors"]).body if isinstance(node, ast.ClassDef)]
    return {name: getattr(errors, name) for name in classes if issubclass(getattr(errors, name), BaseException)}


def shown(cls: type) -> str:
    return "io.UnsupportedOperation" if cls is io.UnsupportedOperation else cls.__name__


def test_every_error_stands_in_the_drawn_tree_with_its_bases() -> None:
    assert drawn_tree(errors.__doc__ or "") == {
        name: [shown(base) for base in error.__bases__] for name, error in defined().items()
    }


def test_all_of_errors_is_sorted_and_names_every_error() -> None:
    assert errors.__all__ == sorted(defined())


def test_every_error_is_exported_under_its_name() -> None:
    assert {name: getattr(bs, name, None) for name in errors.__all__} == defined()


def test_a_traceback_calls_every_error_by_its_public_name() -> None:
    assert {error.__module__ for error in defined().values()} == {"blockstore"}


@pytest.mark.parametrize("name", sorted(set(errors.__all__) - {"BlockStoreError"}))
def test_every_error_is_also_a_builtin_exception(name: str) -> None:
    built_in = [cls for cls in defined()[name].__mro__ if getattr(builtins, cls.__name__, None) is cls]

    assert set(built_in) - {Exception, BaseException, object}


def test_every_error_but_the_warnings_is_caught_by_the_base() -> None:
    others = {name for name, error in defined().items() if not issubclass(error, bs.BlockStoreError)}

    assert others == {"EscapedViewWarning", "FileSystemWarning", "FingerprintWarning", "JournalDamageWarning"}


# -- which module may know which ------------------------------------------------------------------

LAYERS = [
    "errors",
    "alignment",
    "checksums",
    "_os",
    "_disk",
    "_cache",
    "writeback",
    "views",
    "mapped",
    "records",
    "journal",
    "receipts",
    "ledger",
    "sidecar",
    "resume",
    "ranges",
    "writers",
    "allocators",
    "sequences",
    "raw",
    "options",
    "live",
    "store",
    "opening",
    "layouts",
    "layouts.grid",
    "layouts.crc32c",
    "layouts.npy",
    "layouts.values",
    "layouts.shard_index",
    "layouts.zarr",
    "indexing",
    "chunking",
    "picture",
    "fill",
    "draft",
    "plan",
    "published",
    "states",
    "working",
    "shard",
    "publishing",
    "verifying",
    "files",
    "finding",
    "blocks",
    "reading",
    "array",
    "creation",
    "dask",
    "demo",
    "cli",
]
"""Each imports only from those above it. `__init__` and `__main__` may import all."""

THE_PACKAGE = "creation"
"""What importing the package itself amounts to."""


def imported_modules(text: str) -> set[str]:
    """Return the modules of the package that a source imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            module = re.sub(r"^\.+", "blockstore.", module).removesuffix(".")
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "blockstore":
                parts = rest.split(".")
                known = [".".join(parts[:count]) for count in (2, 1) if ".".join(parts[:count]) in LAYERS]
                modules.add(known[0] if known else THE_PACKAGE)
    return modules


def imports_from_below(module: str, text: str) -> set[str]:
    """Return what a module of this name may not import, and this source does."""
    return imported_modules(text) - set(LAYERS[: LAYERS.index(module)])


def test_every_module_has_its_place() -> None:
    assert set(SOURCES) - {"__init__", "__main__"} == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_a_module_imports_only_from_those_above_it(module: str) -> None:
    assert imports_from_below(module, SOURCES[module]) == set()


@pytest.mark.parametrize(
    "text",
    [
        "from blockstore.creation import open_array",
        "from blockstore import errors, creation",
        "import blockstore",
        "import blockstore as bs",
        "import blockstore.creation",
        "from .creation import open_array",
        "from . import creation",
        "from blockstore import create",
        "def f():\n    from blockstore.creation import open_array",
    ],
)
def test_an_import_from_below_is_caught_by_the_same_check(text: str) -> None:
    assert imports_from_below("views", text) == {"creation"}


def test_the_package_itself_imports_nothing_below_the_store() -> None:
    assert imported_modules(SOURCES["__init__"]) & {"dask", "demo", "cli"} == set()


# -- what it never contains -----------------------------------------------------------------------


@every_module
def test_no_check_is_an_assert_which_would_vanish_under_optimization(module: str) -> None:
    lines = [node.lineno for node in ast.walk(ast.parse(SOURCES[module])) if isinstance(node, ast.Assert)]

    assert lines == []


@every_module
def test_a_module_is_short_enough_to_be_read_at_once(module: str) -> None:
    assert len(SOURCES[module].splitlines()) <= LONGER.get(module, 420)


LONGER = {"store": 475, "array": 475, "dask": 485, "shard": 440}
"""One noun each, and a third of it docstrings."""


@every_module
def test_a_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(ast.parse(SOURCES[module]))
