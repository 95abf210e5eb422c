"""The picture of an array says what the states of its blocks say, hides nothing, and keeps to itself."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from blockstore.picture import DURABLE, PENDING, WRITTEN, html

Grid = NDArray[np.uint8]

NAMES = ("pending", "written", "durable")
NOTHING = 9
"""Of a pixel that no state fills."""

small_grids = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=8), elements=st.integers(0, 2))


class Picture(NamedTuple):
    """What a picture shows to somebody who looks at it."""

    pixels: Grid
    legend: dict[str, int]
    caption: str
    label: str


def look(text: str) -> Picture:
    """Look at a picture: fill the rectangles of its paths, none of which may lie on another."""
    root = ElementTree.fromstring(text)
    svg = next(root.iter("svg"))
    width, height = (int(n) + 1 for n in svg.attrib["viewBox"].split()[2:])
    pixels = np.full((height, width), NOTHING, np.uint8)
    for path in svg.findall("g/path"):
        state = next(i for i, name in enumerate(NAMES) if path.attrib["class"].endswith(f"-{name}"))
        rectangles = re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z", path.attrib["d"])
        assert "".join("M{} {}h{}v{}h-{}z".format(*found) for found in rectangles) == path.attrib["d"]
        for x, y, w, h, back in (map(int, found) for found in rectangles):
            assert back == w
            assert (pixels[y : y + h, x : x + w] == NOTHING).all(), "two rectangles lie on each other"
            assert x + w <= width
            assert y + h <= height
            pixels[y : y + h, x : x + w] = state
    keys = [key for key in root.iter("span") if key.attrib["class"].endswith("-key")]
    legend = {}
    for key in keys:
        swatch, count = key.find("i"), key.find("b")
        assert swatch is not None
        assert count is not None
        legend[(swatch.tail or "").strip()] = int((count.text or "").replace(",", ""))
    captions = [div for div in root.iter("div") if div.attrib["class"].endswith("-caption")]
    return Picture(
        pixels,
        legend,
        "".join(captions[0].itertext()).replace("\u00a0", " ").replace("\u00d7", "x"),
        svg.attrib["aria-label"],
    )


def cells(pixels: Grid, rows: int, columns: int) -> Grid:
    """Return the pixels of each cell, shape (rows, columns, pixels of a cell)."""
    height, width = pixels.shape
    assert (height % rows, width % columns) == (0, 0)
    parts = pixels.reshape(rows, height // rows, columns, width // columns)
    return parts.transpose(0, 2, 1, 3).reshape(rows, columns, -1)


def a_million(state: int, *, shape: tuple[int, ...] = (1000, 1000), but: int | None = None, at: int = 543_210) -> Grid:
    states = np.full(10**6, state, np.uint8)
    if but is not None:
        states[at] = but
    return states.reshape(shape)


# -- what it says ---------------------------------------------------------------------------------


@given(small_grids)
def test_legend_and_label_have_the_count_of_each_state(states: Grid) -> None:
    counts = {name: int((states == i).sum()) for i, name in enumerate(NAMES)}

    picture = look(html("t", [], states))

    assert picture.legend == counts
    blocks = f"{states.size:,} block{'' if states.size == 1 else 's'}"
    assert picture.label == f"{blocks}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items())


@given(small_grids)
def test_each_of_a_few_blocks_has_a_cell_of_its_own_and_all_have_the_same_area(states: Grid) -> None:
    pixels = look(html("t", [], states)).pixels

    filled = np.bincount(pixels[pixels != NOTHING], minlength=3)
    area, rest = divmod(int(filled.sum()), states.size)
    assert rest == 0
    assert filled.tolist() == [area * int((states == i).sum()) for i in range(3)]


@given(hnp.arrays(np.uint8, st.tuples(st.integers(2, 64), st.integers(2, 64)), elements=st.integers(0, 2)))
def test_a_grid_is_drawn_as_it_lies(states: Grid) -> None:
    shown = cells(look(html("t", [], states)).pixels, *states.shape)

    assert (shown == states[..., None]).all()


@given(hnp.arrays(np.uint8, st.tuples(*[st.integers(2, 5)] * 3), elements=st.integers(0, 2)))
def test_leading_axes_are_flattened_into_rows_and_the_caption_says_so(states: Grid) -> None:
    flat = states.reshape(-1, states.shape[-1])

    picture = look(html("t", [], states))

    assert (cells(picture.pixels, *flat.shape) == flat[..., None]).all()
    assert "the leading axes are flattened into rows" in picture.caption


@pytest.mark.parametrize("shape", [(100,), (100, 1), (1, 100), (1, 100, 1)])
def test_one_axis_is_a_strip_that_goes_on_in_the_next_line(shape: tuple[int, ...]) -> None:
    states = np.arange(100, dtype=np.uint8) % 3

    picture = look(html("t", [], states.reshape(shape)))

    shown = cells(picture.pixels, 2, 64).reshape(128, -1)
    assert (shown[:100] == states[:, None]).all()
    assert (shown[100:] == NOTHING).all()
    assert "in C order, line by line" in picture.caption


@given(hnp.arrays(np.uint8, st.integers(4097, 9000), elements=st.integers(0, 2), fill=st.integers(0, 2)))
def test_a_cell_of_several_blocks_shows_every_state_that_it_has_and_none_that_it_has_not(states: Grid) -> None:
    picture = look(html("t", [], states))

    found = re.search(r"each cell is (\d+) blocks", picture.caption)
    assert found
    per = int(found[1])
    count = -(-states.size // per)
    shown = cells(picture.pixels, -(-count // 64), 64).reshape(-1, picture.pixels.size // (-(-count // 64) * 64))
    for i in range(count):
        assert set(shown[i].tolist()) == set(states[i * per : (i + 1) * per].tolist())
    assert (shown[count:] == NOTHING).all()


def test_the_share_of_a_state_in_a_cell_grows_with_its_blocks() -> None:
    states = np.full((480, 640), PENDING, np.uint8)
    for row in range(48):
        states.reshape(48, 10, 640)[row].ravel()[: row * 6400 // 47] = DURABLE

    shown = cells(look(html("t", [], states)).pixels, 48, 64)

    durable = (shown == DURABLE).mean(axis=(1, 2))
    assert (np.diff(durable) >= 0).all()
    assert (durable[0], durable[-1]) == (0, 1)


@pytest.mark.parametrize(
    ("shape", "caption"),
    [
        pytest.param((1,), "1 block", id="one"),
        pytest.param((3, 4), "3 x 4 blocks", id="a grid"),
        pytest.param((0, 3), "0 x 3 blocks", id="none"),
        pytest.param((1000, 1000), "1,000 x 1,000 blocks; each cell is 441 blocks (21 x 21)", id="a million"),
        pytest.param(
            (10**6,), "1,000,000 blocks; each cell is 326 blocks; in C order, line by line", id="a long strip"
        ),
        pytest.param((500_000, 2), "500,000 x 2 blocks; each cell is 326 blocks; in C order, line by line", id="long"),
        pytest.param((200, 20), "200 x 20 blocks; in C order, line by line", id="too long for one by one"),
    ],
)
def test_the_caption_says_how_blocks_became_cells(shape: tuple[int, ...], caption: str) -> None:
    assert look(html("t", [], np.full(shape, WRITTEN, np.uint8))).caption == caption


def test_the_caption_says_where_the_first_pending_block_is() -> None:
    states = np.full((20, 20), DURABLE, np.uint8)
    states[[3, 7], [17, 2]] = PENDING

    assert look(html("t", [], states)).caption == "20 x 20 blocks; the first pending block is (3, 17)"


@pytest.mark.parametrize(
    ("pending", "shares"),
    [
        pytest.param(0, ["0", "0", "100"], id="none"),
        pytest.param(1, ["<0.1", "0", ">99.9"], id="few"),
        pytest.param(1234, ["12.3", "0", "87.7"], id="some"),
        pytest.param(9999, [">99.9", "0", "<0.1"], id="most"),
        pytest.param(10_000, ["100", "0", "0"], id="all"),
    ],
)
def test_a_share_is_0_or_100_percent_only_if_it_is_exactly_that(pending: int, shares: list[str]) -> None:
    states = np.full(10_000, DURABLE, np.uint8)
    states[:pending] = PENDING

    root = ElementTree.fromstring(html("t", [], states))

    assert [small.text for small in root.iter("small")] == [f"{share}\u202f%" for share in shares]


# -- nothing is hidden, and nothing too large -----------------------------------------------------


@pytest.mark.parametrize("shape", [(10**6,), (1000, 1000), (100, 100, 100), (500_000, 2)])
@pytest.mark.parametrize("at", [0, 543_210, 999_999])
@pytest.mark.parametrize("rare", [PENDING, WRITTEN])
def test_one_block_of_a_million_that_is_not_durable_is_seen(shape: tuple[int, ...], at: int, rare: int) -> None:
    pixels = look(html("t", [], a_million(DURABLE, shape=shape, but=rare, at=at))).pixels

    ys, xs = np.nonzero(pixels == rare)
    assert len(ys) >= 12
    assert np.ptp(ys) < 12, "it is one cell"
    assert np.ptp(xs) < 12, "it is one cell"


@pytest.mark.parametrize(
    "shape", [(10**6,), (1000, 1000), (100, 100, 100), (64, 64), (128, 32), (4096,), (300, 3333), (2,) * 19]
)
def test_the_largest_picture_is_bounded(shape: tuple[int, ...]) -> None:
    noise = np.random.default_rng(0).integers(0, 3, shape, np.uint8)

    assert len(html("t", [], noise).encode()) < 200_000


def test_blocks_that_are_alike_are_one_rectangle() -> None:
    text = html("t", [], a_million(DURABLE))

    assert len(re.findall(r"h-\d", text)) == 1
    assert len(text) < 8_000


# -- it keeps to itself ---------------------------------------------------------------------------


@given(st.text(), st.lists(st.tuples(st.text(), st.text()), max_size=3))
def test_any_text_is_shown_as_text(title: str, facts: list[tuple[str, str]]) -> None:
    text = html(title, facts, np.zeros(3, np.uint8))

    text.encode()
    root = ElementTree.fromstring(text)
    shown = [cell.text or "" for row in root.iter("tr") for cell in row]
    given = [name_or_value for fact in facts for name_or_value in fact]
    assert list(map(printable, shown)) == list(map(printable, given))


def printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\t\n" else "\ufffd" for c in text)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "</style><b>", "\"&amp;'", "a < b"])
def test_markup_in_title_and_facts_is_escaped(text: str) -> None:
    picture = html(text, [(text, text)], np.zeros(3, np.uint8))

    assert text not in picture
    assert "".join(ElementTree.fromstring(picture).itertext()).count(text) == 3


def test_two_pictures_share_no_class_and_no_id() -> None:
    states = np.zeros(3, np.uint8)

    first, second = (names_in(html("t", [("shape", "3")], states)) for _ in range(2))

    assert len(first) == len(second) > 10
    assert first & second == set()


def names_in(text: str) -> set[str]:
    return {
        name
        for element in ElementTree.fromstring(text).iter()
        for attribute in ("class", "id")
        for name in element.attrib.get(attribute, "").split()
    }


def test_every_rule_of_its_style_applies_to_its_own_elements_only() -> None:
    root = ElementTree.fromstring(html("t", [], np.zeros(3, np.uint8)))
    style = next(root.iter("style")).text or ""
    token = root.attrib["class"]

    rules = re.findall(r"([^{}]+)\{[^{}]*\}", re.sub(r"@supports [^{]*\{(.*?\})\}", r"\1", style, flags=re.S))
    selectors = [selector.strip() for rule in rules for selector in rule.split(",")]
    assert len(selectors) > 20
    assert [selector for selector in selectors if token not in selector] == []


def test_it_loads_nothing() -> None:
    assert re.findall(r"https?:|@import|src=|href=|<script|url\((?!#bs-)", html("t", [], np.zeros(3, np.uint8))) == []


def test_a_state_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="the state of a block is 0, 1 or 2, not 3"):
        html("t", [], np.array([0, 3], np.uint8))


# -- in a browser ---------------------------------------------------------------------------------

PAGES = {
    "a page that says nothing": ("", "#ffffff", "light"),
    "a light JupyterLab": ('data-jp-theme-light="true"', "#ffffff", "light"),
    "a dark JupyterLab": ('data-jp-theme-light="false"', "#111111", "dark"),
    "a dark VS Code": ('class="vscode-dark"', "#111111", "dark"),
    "a page of a dark scheme": ('style="color-scheme:dark"', "#111111", "dark"),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("page", PAGES)
def test_a_browser_paints_states_ever_further_from_the_page(tmp_path: Path, page: str) -> None:
    image = pytest.importorskip("PIL.Image")
    attributes, background, theme = PAGES[page]
    states = np.repeat(np.array([PENDING, WRITTEN, DURABLE], np.uint8), 2).reshape(3, 2)
    (tmp_path / "page.html").write_text(
        f'<!doctype html><meta charset="utf-8"><style>body{{margin:0;background:{background}}}</style>'
        f"<body {attributes}>{html('t', [], states)}",
        encoding="utf-8",
    )
    subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}",
            "--window-size=600,400", f"file://{tmp_path / 'page.html'}",
        ],
        check=True, timeout=60, capture_output=True,
    )  # fmt: skip
    gray = np.asarray(image.open(tmp_path / "page.png").convert("L"))
    lightness = {gray_of(colour) for colour in drawn_colours(theme)}
    assert lightness <= set(gray.ravel().tolist())
    steps = [gray_of(colour) for colour in (background, *drawn_colours(theme))]
    apart = np.diff(steps) if theme == "dark" else -np.diff(steps)
    assert (apart > 20).all()


def drawn_colours(theme: str) -> list[str]:
    style = html("t", [], np.zeros(1, np.uint8))
    pairs = re.findall(r"light-dark\((#\w{6}),(#\w{6})\)", style)
    return [dark if theme == "dark" else light for light, dark in pairs]


def gray_of(colour: str) -> int:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
