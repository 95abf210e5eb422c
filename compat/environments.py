"""Environments: where the readers run. This interpreter, two more with zarr-python alone, and node with zarrita.js.

Those that are not here are made beside the project as ``.venv-compat-*``, once, from PyPI and npm; the newest
zarr-python is looked for anew each time. What cannot be had is `Unavailable`, with a reason.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compat.readers import Reader

PROJECT = Path(__file__).parents[1]

OLDEST = "zarr==3.0.0"
"""The first release of zarr-python 3. It is yanked, as `zarr.load` of it deletes data, but installs if named."""

NEWEST = "zarr>=3,<4"

_SECONDS = 600
"""How long a command may take."""


class Unavailable(Exception):
    """An environment cannot be had here."""


@dataclass(frozen=True, slots=True)
class Environment:
    """How to run a job: what comes before its file on the command line, in which folder, with which variables."""

    command: tuple[str, ...]
    folder: Path = PROJECT
    variables: Mapping[str, str] = field(default_factory=dict)

    def run(self, job: Path, seconds: float) -> None:
        """Run a job, and raise `RuntimeError` with what it said if it ends badly."""
        _run([*self.command, str(job)], self.folder, seconds, self.variables)


@functools.cache
def prepare(name: str) -> Environment:
    """Return the environment of that name, made if it must be; raise `Unavailable` if it cannot be had."""
    try:
        return _PREPARE[name]()
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"{name}: {error}") from None


def missing(reader: Reader) -> list[str]:
    """Return which packages a reader in this interpreter lacks."""
    return [package for package in reader.packages if importlib.util.find_spec(package) is None]


def _run(
    command: list[str], folder: Path, seconds: float = _SECONDS, variables: Mapping[str, str] | None = None
) -> str:
    """Run a command and return what it wrote."""
    environment = {**os.environ, **(variables or {})}
    try:
        ran = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command[:4])} did not end within {seconds:g} s") from None
    if ran.returncode:
        said = (ran.stderr or ran.stdout).strip().splitlines()
        raise RuntimeError(f"{' '.join(command[:4])} ended with {ran.returncode}: {' / '.join(said[-5:])}")
    return ran.stdout


def _python(executable: str) -> Environment:
    return Environment((executable, "-m", "compat.readers"), variables={"PYTHONPATH": str(PROJECT)})


def _here() -> Environment:
    return _python(sys.executable)


def _zarr_oldest() -> Environment:
    return _python(_venv("zarr-oldest", sys.executable, OLDEST, upgrade=False))


def _zarr_newest() -> Environment:
    return _python(_venv("zarr-newest", newest_python(), NEWEST, upgrade=True))


def _venv(name: str, python: str, requirement: str, *, upgrade: bool) -> str:
    """Return the interpreter of ``.venv-compat-NAME``, which has what is required."""
    folder = PROJECT / f".venv-compat-{name}"
    own = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    marker = folder / ".ready"
    said = f"{_version(python)} {requirement}"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != said:
        shutil.rmtree(folder, ignore_errors=True)
        _run([python, "-m", "venv", str(folder)], PROJECT)
    elif not upgrade:
        return str(own)
    pip = [str(own), "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", "install"]
    _run([*pip, *(["--upgrade"] if upgrade else []), requirement], PROJECT)
    marker.write_text(said, encoding="utf-8")
    return str(own)


def newest_python() -> str:
    """Return the interpreter that COMPAT_PYTHON names, or the newest of this and those that are found."""
    if named := os.environ.get("COMPAT_PYTHON"):
        return named
    found = {sys.executable: sys.version_info[:2]}
    for candidate in _pythons():
        try:
            major, minor = _version(candidate).split(".")[:2]
        except (OSError, RuntimeError):
            continue
        found[candidate] = (int(major), int(minor))
    return max(found, key=lambda candidate: found[candidate])


def _pythons() -> Iterator[str]:
    for minor in (14, 13, 12):
        if path := shutil.which(f"python3.{minor}"):
            yield path
    for folder in sorted(PROJECT.glob(".venv-cpython-*-dev")):
        if re.fullmatch(r"\.venv-cpython-[0-9.]+-dev", folder.name):
            yield str(folder / "bin" / "python")


def _version(python: str) -> str:
    return _run([python, "-c", "import platform; print(platform.python_version())"], PROJECT, 60).strip()


def _zarrita() -> Environment:
    node, npm = shutil.which("node"), shutil.which("npm")
    if not (node and npm):
        raise Unavailable("zarrita: node and npm are not there")
    folder = PROJECT / ".venv-compat-zarrita"
    folder.mkdir(exist_ok=True)
    wanted = (PROJECT / "compat" / "package.json").read_text(encoding="utf-8")
    marker = folder / ".ready"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != wanted:
        (folder / "package.json").write_text(wanted, encoding="utf-8")
        _run([npm, "install", "--no-package-lock", "--no-audit", "--no-fund"], folder)
        marker.write_text(wanted, encoding="utf-8")
    script = folder / "with_zarrita.mjs"
    shutil.copyfile(PROJECT / "compat" / "readers" / script.name, script)
    return Environment((node, str(script)), folder)


_PREPARE: dict[str, Callable[[], Environment]] = {
    "here": _here,
    "zarr-oldest": _zarr_oldest,
    "zarr-newest": _zarr_newest,
    "zarrita": _zarrita,
}
