"""The page: its numbers against numpy's, its HTML whole and alone, and how Chromium shows it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import jaxcomp as jc
from jaxcomp.activations.coverage import Coverage, Covered
from jaxcomp.report import Point, report
from jaxcomp.report import page as module
from jaxcomp.report.histograms import BINS, histogram
from jaxcomp.report.pictures import MOST_PIXELS, mask_pixels, mask_png
from tests.report import trees

POINTS = [Point("float <32>", 3000, 0.99), Point("int8", 1000, 0.99), Point("joint", 500, 0.97), Point("bad", 900, 0.9)]
COVERAGE = Coverage(
    (
        Covered("dense/kernel", "dot", "integer", "Int(4)", "8 bits, Static", ""),
        Covered("head/kernel", "dot", "exact", "Codebook", "", "no rule matches it | none"),
    )
)
TITLE = "What <b>happened</b> & why | all"


@pytest.fixture(scope="module")
def made():
    return report(trees.before(), trees.after(), title=TITLE, points=POINTS, coverage=COVERAGE)


@pytest.fixture(scope="module")
def page(made):
    return made.html()


# Numbers


def test_totals_are_sums(made):
    before, after = trees.before(), trees.host(trees.after())
    sizes = [sum(np.size(x) for x in leaves_of(tree)) for tree in (before, after)]
    zeros = [sum(int((x == 0).sum()) for x in leaves_of(tree)) for tree in (before, after)]
    for total, tree, size, zero in zip((made.before, made.after), (before, trees.after()), sizes, zeros, strict=True):
        assert total.weights == size
        assert total.zeros == pytest.approx(zero / size)
        assert total.bytes == jc.artifact.file_size(tree)
        assert total.bits == 8 * total.bytes / size
        assert total.macs is None
    assert made.ratio == made.before.bytes / made.after.bytes > 2
    assert repr(made).startswith("Report('What <b>")
    assert "4 leaves" in repr(made)


def leaves_of(tree):
    return [tree["conv"]["kernel"], tree["conv"]["bias"], tree["dense"]["kernel"], tree["head"]["kernel"]]


def test_lines_hold_the_weights_that_have_their_codes():
    w, leaf = trees.before()["dense"]["kernel"], trees.after()["dense"]["kernel"]
    h = histogram(w, leaf)
    codes, kept = np.asarray(leaf.values.codes), np.asarray(leaf.mask)
    wanted = [((codes == c) & kept).sum() / w.size for c in range(-8, 8)]
    np.testing.assert_allclose(h.on_lines, wanted)
    assert h.lines == tuple(range(-8, 8))
    assert h.unit == "weight / its scale"
    assert h.counted == (w.size, w.size)
    assert len(h.before) == len(h.after) == len(h.edges) - 1 == BINS
    assert sum(h.before) == pytest.approx(1)
    assert sum(h.after) == pytest.approx(kept.mean())
    inside = (w / np.asarray(leaf.values.scale)).reshape(-1)
    counts = np.histogram(inside.clip(h.edges[0], h.edges[-1]), np.array(h.edges))[0]
    np.testing.assert_allclose(h.before, counts / w.size)


def test_one_scale_has_the_axis_of_the_weights():
    w = np.linspace(-1, 1, 60, dtype=np.float32).reshape(60, 1)
    leaf = trees.quantized(w, 2)
    h = histogram(w, leaf)
    scale = float(np.asarray(leaf.scale)[0, 0])
    assert h.unit == "weight"
    np.testing.assert_allclose(h.lines, np.arange(-2, 2) * scale)
    np.testing.assert_allclose(h.on_lines, [(np.asarray(leaf.codes) == c).mean() for c in range(-2, 2)])


def test_a_table_of_shared_weights_has_its_entries_as_lines():
    leaf = trees.after()["head"]["kernel"]
    h = histogram(trees.before()["head"]["kernel"], leaf)
    np.testing.assert_allclose(h.lines, np.asarray(leaf.table)[:, 0])
    np.testing.assert_allclose(h.on_lines, np.bincount(np.asarray(leaf.codes).reshape(-1), minlength=6) / 160)


@pytest.mark.parametrize(
    "before",
    [np.zeros((0, 2)), np.zeros((3, 2)), np.full((3, 2), np.nan), np.array([[np.inf, 1.0]]), np.full((2, 2), 1e38)],
    ids=["empty", "zeros", "nan", "infinite", "huge"],
)
def test_hard_weights_have_histograms_and_pages(before):
    w = before.astype(np.float32)
    h = histogram(w, w)
    assert np.isfinite(h.edges).all()
    assert np.all(np.diff(h.edges) > 0)
    if w.size:
        text = report({"w": w}, {"w": np.where(np.isfinite(w), w / 2, 0)}).json()
        assert "NaN" not in text
        assert "Infinity" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        jc.quantize(jc.Int(4, symmetric=False)),
        jc.quantize(jc.Int(1)),
        jc.quantize(jc.Log(4)),
        jc.quantize(jc.quantization.NF4(), per=jc.Groups(16)),
        jc.quantize(jc.Int(4), per=jc.core.layouts.Buckets(100)),
        jc.chain(jc.prune(0.5), jc.quantize(jc.Int(8), per=jc.core.layouts.Buckets(100))),
        jc.chain(jc.low_rank(4), jc.quantize(jc.Int(8))),
        jc.share(8),
    ],
    ids=["asymmetric", "sign", "log", "groups", "buckets", "masked_buckets", "low_rank", "share"],
)
def test_every_kind_of_leaf_has_a_picture_that_packing_does_not_change(method, tmp_path):
    w = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)}
    tree, kernel = method.apply(method.init(w), w), np.asarray(w["kernel"])
    h = histogram(kernel, tree["kernel"])
    assert h == histogram(kernel, jc.pack(tree)["kernel"])
    assert sum(h.before) == pytest.approx(1)
    if h.lines:
        assert sum(h.on_lines) == pytest.approx(sum(h.after), abs=1e-9)
    report(w, tree).save(tmp_path / "page.html")


# Pictures


@given(st.integers(1, 700), st.integers(1, 50), st.integers(0, 3))
def test_a_mask_is_drawn_entry_by_entry_or_in_means(rows, columns, seed):
    kept = np.random.default_rng(seed).random((rows, columns)) < 0.3
    pixels, turned = mask_pixels(kept)
    flat = kept.T if turned else kept
    assert turned == (rows > columns)
    assert max(pixels.shape) <= MOST_PIXELS
    if flat.shape == pixels.shape:
        assert (pixels == flat).all()
    else:
        block = -(-flat.shape[1] // MOST_PIXELS)
        wanted = [flat[:, i : i + block].mean(1) for i in range(0, flat.shape[1], block)]
        np.testing.assert_allclose(pixels, np.stack(wanted, 1), atol=1e-6)


def test_a_picture_of_a_mask_has_its_pixels():
    kept = np.random.default_rng(0).random((20, 30)) < 0.5
    shown = np.asarray(Image.open(io.BytesIO(mask_png(mask_pixels(kept)[0]))).convert("L"))
    assert shown.shape == kept.shape
    assert shown[kept].max() < shown[~kept].min()


# HTML


class Whole(HTMLParser):
    """Whether every element is closed, what the page refers to, and its text."""

    VOID = ("meta", "img", "br", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]
        self.alts += [dict(attrs)["alt"]] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page: str) -> Whole:
    whole = Whole()
    whole.feed(page)
    assert not whole.open
    return whole


def test_the_page_is_whole_and_needs_nothing_beside_it(page):
    whole = read(page)
    assert whole.addresses
    assert all(a.startswith("data:image/png;base64,") for a in whole.addresses)
    assert "url(" not in page
    assert "@import" not in page
    assert not {"script", "link", "iframe", "b>"} & whole.tags
    assert all(whole.alts)
    for address in whole.addresses:
        Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).verify()


def test_the_page_says_what_is_in_the_report(made, page):
    text = " ".join(" ".join(read(page).text).split())
    assert TITLE in text
    error = f"{made.layers[1].error:.1%}"
    for wanted in (
        "float <32>",
        "best at its size",
        f"{made.after.bytes:,}",
        "no rule matches it | none",
        "50.0%",
        error,
    ):
        assert wanted in text
    assert text.count("best at its size") == 2
    assert "dense/ kernel" in text
    assert page == made.html(), "the same report makes the same bytes"


def test_a_page_of_little_has_no_empty_parts():
    page = report({"w": np.ones((2, 2), np.float32)}, {"w": np.ones((2, 2), np.float32)}).html()
    assert [h for h in ("Frontier", "Layers", "Weights", "Coverage") if f"<h2>{h}" in page] == ["Layers"]


def test_few_leaves_are_drawn_where_few_are_wanted(monkeypatch):
    assert report(trees.before(), trees.after(), pictures=0).drawn == ()
    (one,) = report(trees.before(), trees.after(), pictures=1).drawn
    assert one.path == "dense/kernel", "the largest"
    assert one.kept is not None


def test_what_was_compressed_is_drawn_first_and_plain_arrays_have_no_lines():
    old, new = trees.before(), trees.after()
    old["wide"], new["wide"] = np.ones(5000, np.float32), np.linspace(0, 1, 5000, dtype=np.float32)
    assert "wide" not in {d.path for d in report(old, new).drawn}
    trained = {"bias": np.linspace(0, 1, 90, dtype=np.float32)}
    (one,) = report({"bias": trained["bias"] + 1}, trained).drawn
    assert one.histogram.lines == ()


def test_sizes_of_files_count_where_they_are_known():
    done = report(trees.before(), trees.after(), sizes=(9000, 3000), pictures=0)
    assert (done.before.bytes, done.after.bytes, done.ratio) == (9000, 3000, 3)


def test_a_notebook_shows_the_page_in_a_frame(made, page, monkeypatch):
    framed = made._repr_html_()
    (source,) = re.findall(r'srcdoc="([^"]*)"', framed)
    import html

    assert html.unescape(source) == page
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert made._repr_html_() is None


# Other forms


def test_json_holds_the_numbers(made):
    data = json.loads(made.json())
    assert data["ratio"] == made.ratio
    assert [layer["path"] for layer in data["layers"]] == [c.path for c in made.layers]
    assert data["layers"][1]["after"]["bytes"] == made.layers[1].after.bytes
    assert [p["name"] for p in data["points"] if p["best"]] == ["int8", "joint"]
    assert data["coverage"][0]["done"] == "integer"
    assert data["histograms"]["dense/kernel"]["lines"] == list(range(-8, 8))


def test_markdown_is_tables(made):
    text = made.markdown()
    assert text == str(made)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block
    assert "# What &lt;b>happened&lt;/b> & why \\| all" in text
    assert "| joint | 500 | 0.97 | best |" in text


def test_a_file_has_the_form_that_its_name_says(made, page, tmp_path):
    for name, wanted in (("r.html", page), ("r.MD", made.markdown()), ("r.json", made.json())):
        made.save(tmp_path / name)
        assert (tmp_path / name).read_text() == wanted


def test_what_cannot_be_is_said(made, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"report: '.*page.txt' must end in .html or .md or .json; name the file so."):
        made.save(tmp_path / "page.txt")
    with pytest.raises(ValueError, match="report: pictures must be a number of leaves, 0 or more, got -1"):
        report({}, {}, pictures=-1)
    with pytest.raises(ValueError, match="report: neither tree holds an array; give it trees of parameters"):
        report({"a": "b"}, {})
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "jinja2" else name)
    with pytest.raises(ImportError, match=r"report: HTML wants jinja2: pip install 'jaxcomp\[report\]'; .md and .json"):
        made.save(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


# A browser

PROBE = """<!doctype html><body><iframe id=f style="width:%dpx;height:900px;border:0" src="page.html"></iframe><script>
f.onload = () => { const d = f.contentDocument, r = d.documentElement;
  document.title = JSON.stringify({ mode: d.compatMode, images: [...d.images].map(i => i.naturalWidth),
    over: r.scrollWidth - r.clientWidth, height: r.scrollHeight, headings: [...d.querySelectorAll("h2")].length }); };
</script>"""


@pytest.mark.parametrize("width", [1200, 400])
def test_chromium_shows_the_page(page, tmp_path, width):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium here")
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "probe.html").write_text(PROBE % width)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    done = subprocess.run(
        [chromium, *flags, (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, check=True
    )
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    seen = json.loads(title)
    assert seen["mode"] == "CSS1Compat", "the page is not in quirks mode"
    assert len(seen["images"]) == 5
    assert all(seen["images"]), "every picture is shown"
    assert seen["over"] == 0, "nothing sticks out to the right"
    assert seen["headings"] == 4
    assert seen["height"] > 900
