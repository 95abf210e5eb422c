"""README.md: its Python blocks do what they show, and its links lead somewhere."""

import doctest
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_every_python_block_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    globs: dict[str, object] = {}
    report: list[str] = []

    for block in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        line = TEXT[: block.start(1)].count("\n")
        test = doctest.DocTestParser().get_doctest(block[1], globs, README.name, str(README), line)
        assert test.examples, f"the block in line {line} has no example"
        test.globs = globs
        runner.run(test, out=report.append, clear_globs=False)

    assert runner.summarize(verbose=False).failed == 0, "".join(report)
    assert runner.tries > 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_every_link_leads_to_a_file(target: str) -> None:
    assert (README.parent / target).exists()


def test_every_error_is_named() -> None:
    import blockstore as bs

    errors = {name for name in bs.__all__ if name.endswith("Error")}

    assert {name for name in errors if f"`{name}`" not in TEXT} == set()
