"""The report of a run: what its page says, that nothing in it is taken for more than text, and how it works in a
browser."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_runner import explainer

from fastdtd import heatmap, report, results, runner, sources
from fastdtd.cli import main
from fastdtd.errors import InputError, OutputError
from fastdtd.files import FolderLock
from fastdtd.results import ShardWriter, Storage, open_results, read_set, shard_path

CLASSES = ("ant", "bee", "cat", "dog", "eel")
HOSTILE = ('</script><script>document.title="taken"</script>', '<img src=x onerror=\'document.title="taken"\'>',
           "<!--<script>", "]]>&lt;&amp;", "\u2028\u2029", "\u202egpj.exe", "'\"`${1}", "__proto__", " ", "a" * 300)
SHAPE = (3, 12, 16)


def make_run(out, files, *, storage=Storage(), classes=CLASSES, failed=(), rank_count=1, shard=64, labels=None,  # noqa: B008
             picture=None, seed=0):
    """A finished run, written without a network: random relevance of random classes."""
    rng = np.random.default_rng(seed)
    (out / results.SHARDS).mkdir(parents=True)
    count = len(files) + len(failed)
    manifest = {
        "format": "fastdtd-run", "version": results.VERSION, "fastdtd": "0.1.0", "conserves": True,
        "model": {"sha256": "0" * 64, "input": list(SHAPE), "outputs": len(CLASSES)},
        "rules": {"conv": "zplus"}, "preprocessing": {"color": "rgb", "resize": "stretch"},
        "storage": dataclasses.asdict(storage) if storage else None, "images": {"count": count}, "shard": shard,
        "shards": max(1, -(-count // shard)),
    }
    results.write_manifest(out, manifest)
    with open(out / results.SET, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(results.SET_COLUMNS)
        table.writerows((i, name, "", picture or out / "gone.png", -1, -1, "") for i, name in enumerate(files))
    kept = storage or Storage()
    heads = []
    for number in range(manifest["shards"]):
        path = shard_path(out, number)
        path.touch()
        images = np.arange(number * shard, min((number + 1) * shard, len(files)))
        rows = len(images) * rank_count
        writer = ShardWriter(path, kept, SHAPE, rows if storage else 0, 4096)
        if rows:
            relevance = rng.random((rows, *SHAPE), np.float32) ** 4
            stored, scale = kept.stored(relevance)
            prediction = rng.random((rows, len(CLASSES)), np.float32)
            sums = relevance.sum((1, 2, 3), dtype=np.float64)
            names = np.array([files[i] for i in images], object)
            columns = {
                "image": images.repeat(rank_count), "file": names.repeat(rank_count),
                "rank": np.tile(np.arange(rank_count), len(images)), "target": prediction.argmax(1), "scale": scale,
                "label": np.full(rows, -1) if labels is None else np.array(labels)[images].repeat(rank_count),
                "prediction": prediction, "score": sums.astype(np.float32), "explained": sums, "sum": sums,
                "absorbed": np.zeros(rows), "ledger": np.zeros((rows, 1)),
            }
            writer.add(columns | ({"attribution": stored} if storage else {}))
        is_last = number == manifest["shards"] - 1
        heads.append(writer.finish([(len(files) + i, *one) for i, one in enumerate(failed)] if is_last else [],
                                   ["conv"]))
    results.join(out, manifest, heads, list(classes))
    return out


class _Page(HTMLParser):
    """Elements with attributes, and what is in each script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def page_of(out):
    return _Page((out / report.PAGE).read_text("utf-8"))


def data_of(out):
    return json.loads(page_of(out).scripts[0])


def sheet_of(out, name="00000"):
    return np.asarray(Image.open(out / data_of(out)["folder"] / f"{name}.jfif")).astype(float)


def cell(sheet, at, width, height):
    left, top = at % 3 * report.TILE, at // 3 * report.TILE
    return sheet[top:top + height, left:left + width]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (30, 40, 3), np.uint8)).resize((400, 300)).save(path)
    return path


# ---- What is in the page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [
    Storage(), Storage("float16"), Storage("int8"), Storage("int8", channels=False), Storage(channels=False,
                                                                                             compression="gzip"),
], ids=str)
def test_data_is_that_of_the_run(tmp_path, picture, storage):
    files = [f"{i}.png" for i in range(30)]
    out = make_run(tmp_path / "out", files, storage=storage, labels=np.arange(30) % 5, picture=picture, shard=8,
                   failed=[("bad.png", "is damaged")])
    assert report.write(out, workers=2) == out / report.PAGE
    data, found = data_of(out), open_results(out)
    columns = data["columns"]
    assert sorted(columns["file"]) == sorted(files)
    assert columns["target"] == sorted(columns["target"])  # classes are together
    for place, row in enumerate(columns["image"]):  # of one target each, so that rows are images
        for name in ("target", "label"):
            assert columns[name][place] == found.columns[name][row]
        for name in ("score", "sum", "explained", "absorbed"):
            assert columns[name][place] == pytest.approx(found.columns[name][row], rel=1e-5)
        assert columns["winner"][place] == found.columns["prediction"][row].argmax()
        sizes = np.sort(np.abs(found[row].sum(0, dtype=np.float64)).ravel())
        assert columns["concentration"][place] == pytest.approx(sizes[-19:].sum() / sizes.sum(), rel=1e-5)
        assert (columns["width"][place], columns["height"][place]) == (192, 144)
    assert data["totals"] | {"explained": 0, "sum": 0} == {
        "explanations": 30, "images": 31, "failed": 1, "known": 30, "explained": 0, "sum": 0, "absorbed": 0,
        "right": int((found.columns["prediction"].argmax(1) == np.arange(30) % 5).sum())}
    assert data["failed"] == [[30, "bad.png", "is damaged"]]
    assert data["gone"] == {}
    assert data["classes"] == {str(i): name for i, name in enumerate(CLASSES)}
    assert sum(data["counts"].values()) == 30
    assert data["manifest"] == found.manifest


def test_thumbnails_are_the_picture_the_heatmap_and_the_overlay(tmp_path, picture):
    out = make_run(tmp_path / "out", [f"{i}.png" for i in range(14)], picture=picture)
    report.write(out)
    data, found = data_of(out), open_results(out)
    wanted = np.asarray(Image.open(picture).resize((192, 144), Image.Resampling.BILINEAR)).astype(float)
    for place in (0, 11, 12, 13):  # the last of a sheet, and the first of the next
        sheet = sheet_of(out, f"{place // 12:05}")
        pixels = heatmap.pixel_relevance(found[data["columns"]["image"][place]])
        scale = heatmap.scale_of(pixels)
        over = heatmap.shaded(pixels, scale, (192, 144), Image.fromarray(wanted.astype(np.uint8)))
        for kind, drawn in enumerate((wanted, heatmap.shaded(pixels, scale, (192, 144)), over)):
            assert np.abs(cell(sheet, 3 * (place % 12) + kind, 192, 144) - np.asarray(drawn)).mean() < 6, (place, kind)


def test_means_are_those_of_the_classes(tmp_path):
    out = make_run(tmp_path / "out", [f"{i}.png" for i in range(40)], shard=16)
    report.write(out, workers=3)
    data, found = data_of(out), open_results(out)
    sheet = sheet_of(out, "class-00000")
    for at, (target, count, width, height) in enumerate(data["means"]):
        rows = np.flatnonzero(found.columns["target"] == target)
        mean = np.mean([found[int(row)].sum(0, dtype=np.float64) for row in rows], 0)
        assert (count, width, height) == (len(rows), 192, 144)
        drawn = np.asarray(heatmap.shaded(mean, heatmap.scale_of(mean), (192, 144)))
        assert np.abs(cell(sheet, at, 192, 144) - drawn).mean() < 6
    assert [target for target, *_ in data["means"]] == sorted(set(found.columns["target"].tolist()))


def test_more_classes_than_a_sheet_of_means_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SHEET", 1)
    out = make_run(tmp_path / "out", [f"{i}.png" for i in range(40)])
    report.write(out)
    data = data_of(out)
    assert len(data["means"]) == 5
    assert {path.name for path in (out / data["folder"]).glob("class*")} == {"class-00000.jfif", "class-00001.jfif"}


@pytest.mark.parametrize(("shape", "size"), [((12, 16), (192, 144)), ((5, 3), (114, 190)), ((1, 1), (192, 192)),
                                             ((1, 1000), (192, 1)), ((384, 192), (96, 192))])
def test_thumbnails_keep_proportions(shape, size):
    assert report._tile_size(shape[::-1]) == size


@pytest.mark.parametrize(("relevance", "share"), [
    (np.ones((10, 10)), 0.1), (-np.ones((10, 10)), 0.1), (np.eye(10), 1.0), (np.diag(np.ones(10)) - 1 / 9, 0.5),
    (np.ones((1, 1)), 1.0),
], ids=["even", "even, negative", "few", "of both signs", "one pixel"])
def test_concentration(relevance, share):
    """np.eye - 1/9: ten pixels of 8/9 and ninety of 1/9, whatever the sign."""
    wanted = 80 / 9 / (80 / 9 + 90 / 9) if share == 0.5 else share
    assert report.concentration(relevance) == pytest.approx(wanted)


def test_no_relevance_has_no_concentration(tmp_path):
    assert np.isnan(report.concentration(np.zeros((4, 4))))
    out = make_run(tmp_path / "out", ["0.png"])
    path = shard_path(out, 0)
    import h5py

    with h5py.File(path, "r+") as file:
        file["attribution"][...] = 0
    report.write(out)
    assert data_of(out)["columns"]["concentration"] == [None]


def test_picture_that_is_gone(tmp_path, picture):
    out = make_run(tmp_path / "out", ["a.png", "b.png"], picture=picture)
    picture.unlink()
    report.write(out)
    data = data_of(out)
    assert data["gone"].keys() == {"0", "1"}
    assert "does not exist" in data["gone"]["0"]
    sheet = sheet_of(out)
    assert cell(sheet, 0, 192, 144).min() > 250  # nothing
    assert cell(sheet, 1, 192, 144).min() < 100  # the heatmap


@pytest.mark.parametrize("damage", ["missing", "other columns", "cut off", "no text", "of another set"])
def test_without_the_list_of_images_there_are_heatmaps(tmp_path, picture, damage):
    out = make_run(tmp_path / "out", ["a.png", "b.png"], picture=picture)
    path = out / results.SET
    content = path.read_bytes()
    {"missing": path.unlink, "other columns": lambda: path.write_bytes(b"image,path\n0,a.png\n"),
     "cut off": lambda: path.write_bytes(content[:-20]), "no text": lambda: path.write_bytes(b"\xff" * 100),
     "of another set": lambda: path.write_bytes(content.splitlines(keepends=True)[0])}[damage]()
    report.write(out)
    assert "images.csv" in data_of(out)["gone"]["0"]


@pytest.mark.parametrize(("files", "rank_count", "most", "images", "rows"), [
    (10, 1, 100, 10, 10), (10, 1, 10, 10, 10), (10, 1, 4, 4, 4), (10, 3, 30, 10, 30), (10, 3, 8, 2, 6),
    (10, 3, 2, 1, 2), (1, 1, 1, 1, 1)])
def test_of_a_large_run_images_at_even_distances(tmp_path, files, rank_count, most, images, rows):
    out = make_run(tmp_path / "out", [f"{i}.png" for i in range(files)], rank_count=rank_count, shard=4)
    report.write(out, most)
    data = data_of(out)
    numbers = sorted(set(data["columns"]["image"]))
    assert numbers == [i * files // images for i in range(images)]
    assert len(data["columns"]["image"]) == rows
    assert data["totals"]["explanations"] == files * rank_count
    assert sum(count for _, count, *_ in data["means"]) == rows


def test_all_targets_of_an_image(tmp_path, picture):
    out = make_run(tmp_path / "out", ["a.png", "b.png"], rank_count=3, picture=picture)
    report.write(out)
    columns = data_of(out)["columns"]
    assert sorted(zip(columns["image"], columns["rank"], strict=True)) == [(i, r) for i in range(2) for r in range(3)]


def test_classes_without_names(tmp_path):
    out = make_run(tmp_path / "out", ["a.png"], classes=())
    assert open_results(out).classes == ()
    report.write(out)
    assert data_of(out)["classes"] == {}


def test_run_in_which_all_failed(tmp_path):
    out = make_run(tmp_path / "out", [], failed=[(f"{i}.png", "is <damaged>") for i in range(1500)], shard=2000)
    report.write(out)
    data = data_of(out)
    assert data["columns"]["image"] == []
    assert data["totals"]["failed"] == 1500
    assert len(data["failed"]) == 1000


def test_numbers_that_json_has_not(tmp_path):
    out = make_run(tmp_path / "out", ["a.png"])
    manifest = results.read_manifest(out)
    (out / results.MANIFEST).write_text(json.dumps(manifest | {"mean": [float("nan"), 1.5], "std": float("inf")}))
    report.write(out)
    assert data_of(out)["manifest"]["mean"] == [None, 1.5]
    assert data_of(out)["manifest"]["std"] is None


# ---- What strangers wrote is text ------------------------------------------------------------------------------------


def hostile_run(out):
    return make_run(out, [f"{name}{i}.png" for i, name in enumerate(HOSTILE)] * 3, classes=HOSTILE[:5],
                    labels=[i % 5 for i in range(30)], failed=[(f"{name}.png", name) for name in HOSTILE])


def test_nothing_ends_the_data(tmp_path):
    out = hostile_run(tmp_path / "</script><b>out")
    report.write(out)
    clean = make_run(tmp_path / "clean", ["a.png"])
    report.write(clean)
    assert len(page_of(out).elements) == len(page_of(clean).elements)
    data = data_of(out)
    assert set(data["columns"]["file"]) == {f"{name}{i}.png" for i, name in enumerate(HOSTILE)}
    assert [reason for _, _, reason in data["failed"]] == list(HOSTILE)
    assert list(data["classes"].values()) == list(HOSTILE[:5])
    assert data["name"] == "script><b>out"
    raw = (out / report.PAGE).read_text("utf-8").partition('id="data">')[2].partition("</script>")[0]
    assert not set("<>&") & set(raw)
    assert raw.isascii()


def test_page_makes_text_alone():
    """What could make HTML or code of a text does not occur."""
    template = Path(report.__file__).with_name(report.PAGE).read_text("utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|setTimeout|fetch|https?:",
                         template)
    assert not re.search(r"<[^>]* on\w+=|<[^>]* style=", template)


def test_policy_allows_what_is_the_pages_own(tmp_path):
    out = make_run(tmp_path / "out", ["a.png"])
    report.write(out)
    [policy] = [attributes["content"] for tag, attributes in page_of(out).elements
                if tag == "meta" and "http-equiv" in attributes]
    directives = dict(one.strip().split(" ", 1) for one in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "'self' file:"
    assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", directives[name]) for name in ("script-src", "style-src"))


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_set_is_read_as_it_was_found(tmp_path):
    """Whatever the paths are, and from wherever the report is made."""
    place = tmp_path / "pictures"
    place.mkdir()
    names = [b"plain.png", b"a,b \"c\".png", b"line\nbreak.png", "größe.png".encode()]
    if sys.platform == "linux":
        names.append(b"no utf-8 \xff\x80.png")
    for name in names:
        Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(os.path.join(os.fsencode(place), name), "PNG")
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        entries = sources.find(["pictures"])
        entries += [dataclasses.replace(entries[0], name="of a tar", label="cat", member=512, size=99),
                    dataclasses.replace(entries[0], name="of HDF5", member=3, dataset="/a/b")]
        runner.run(explainer(), entries, tmp_path / "out", outputs=["relevance"])
    finally:
        os.chdir(before)
    wanted = {i: dataclasses.replace(entry, path=os.path.join(tmp_path, entry.path)) for i, entry in enumerate(entries)}
    assert read_set(tmp_path / "out", range(100)) == wanted
    assert read_set(tmp_path / "out", {2}) == {2: wanted[2]}
    report.write(tmp_path / "out")
    data = data_of(tmp_path / "out")
    assert not {data["columns"]["image"][int(place)] for place in data["gone"]} & set(range(len(names)))


def test_second_report_takes_the_place_of_the_first(tmp_path, picture):
    out = make_run(tmp_path / "out", ["a.png"], picture=picture)
    report.write(out)
    first = data_of(out)["folder"]
    drawn = out / report.FOLDER / "cat.png.heatmap.png"  # of a set with a folder of that name
    drawn.touch()
    report.write(out)
    second = data_of(out)["folder"]
    assert first != second
    assert not (out / first).exists()
    assert (out / second).is_dir()
    assert drawn.exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_report_that_cannot_be_finished_leaves_the_one_before(tmp_path, picture, monkeypatch):
    out = make_run(tmp_path / "out", [f"{i}.png" for i in range(40)], picture=picture)
    report.write(out)
    before = (out / report.PAGE).read_bytes()
    folders = os.listdir(out / report.FOLDER)
    count = iter(range(100))

    def full(*_):
        if next(count) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(report._Sheet, "save", full)
    with pytest.raises(OutputError, match="No space left on device"):
        report.write(out, workers=2)
    assert (out / report.PAGE).read_bytes() == before
    assert os.listdir(out / report.FOLDER) == folders


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_report_that_is_killed_does_no_harm(tmp_path, picture):
    out = make_run(tmp_path / "out", [f"{i}.png" for i in range(40)], picture=picture)
    report.write(out)
    before = (out / report.PAGE).read_bytes()
    code = ("import os, signal, sys; from fastdtd import report\n"
            "report.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nreport.write(sys.argv[1])")
    assert subprocess.run([sys.executable, "-c", code, out], check=False).returncode == -signal.SIGKILL
    assert (out / report.PAGE).read_bytes() == before
    assert (out / data_of(out)["folder"]).is_dir()
    report.write(out)
    assert os.listdir(out / report.FOLDER) == [os.path.basename(data_of(out)["folder"])]


def test_thumbnails_are_no_pictures_of_a_set(tmp_path, picture):
    """A set that is a folder above the run's stays the set that it was."""
    out = make_run(tmp_path / "out", ["a.png"], picture=picture)
    report.write(out)
    assert [entry.name for entry in sources.find([tmp_path])] == ["picture.png"]


def test_refused_is_what_cannot_be_shown(tmp_path):
    with pytest.raises(OutputError, match=r"did not keep relevance.*--outputs"):
        report.write(make_run(tmp_path / "numbers", ["a.png"], storage=None))
    with pytest.raises(OutputError, match="is no folder"):
        report.write(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match=r"no manifest\.json"):
        report.write(tmp_path / "empty")
    assert not os.listdir(tmp_path / "empty")
    out = make_run(tmp_path / "out", ["a.png"] * 3, shard=1)
    with FolderLock(out), pytest.raises(OutputError, match="a run or another report"):
        report.write(out)
    shard_path(out, 1).unlink()
    with pytest.raises(OutputError, match="missing or damaged"):
        report.write(out)
    assert not (out / report.FOLDER).exists()


@pytest.mark.parametrize("options", [{"shown_at_most": 0}, {"shown_at_most": 50_001}, {"shown_at_most": 2.5},
                                     {"workers": 0}, {"workers": True}], ids=str)
def test_refused_numbers(tmp_path, options):
    with pytest.raises(InputError, match="required: a whole number from 1 to"):
        report.write(tmp_path, **options)


def test_command(tmp_path, picture, capsys):
    out = make_run(tmp_path / "out", [f"{i}.png" for i in range(5)], picture=picture)
    assert main(["report", str(out), "--images", "3", "--workers", "1"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert len(data_of(out)["columns"]["image"]) == 3
    assert main(["report", str(tmp_path)]) == 1
    assert "required: the output folder of a run" in capsys.readouterr().err


# ---- In a browser ----------------------------------------------------------------------------------------------------


class _Opened:
    """A page in a browser, and whatever it complained about or asked for."""

    def __init__(self, browser, out, **options):
        self.page = browser.new_page(**{"viewport": {"width": 1320, "height": 860}, **options})
        self.page.set_default_timeout(5000)
        self.told, self.asked = [], []
        self.page.on("console", lambda message: self.told.append(message.text))
        self.page.on("pageerror", lambda error: self.told.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto((out / report.PAGE).as_uri())

    def names(self, grid="#grid"):
        """Of the cards in the document, in their order."""
        return self.page.eval_on_selector_all(
            f"{grid} .card", "cards => cards.sort((a, b) => a.dataset.place - b.dataset.place)"
            ".map(card => card.querySelector('.quiet').textContent)")

    def active(self):
        return self.page.eval_on_selector("#grid .card.active", "card => Number(card.dataset.place)")

    def count(self):
        return self.page.text_content("#count")


@pytest.fixture
def opened(browser, tmp_path):
    pages = []

    def open_page(out, **options):
        pages.append(_Opened(browser, out, **options))
        return pages[-1]

    yield open_page
    for one in pages:
        one.page.close()
        assert one.told == []
        assert all(url.startswith("file:") for url in one.asked)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of forty pictures with a report, which no test changes."""
    place = tmp_path_factory.mktemp("made")
    Image.fromarray(np.full((30, 40, 3), 120, np.uint8)).save(place / "picture.png")
    out = make_run(place / "out", [f"{i:02}.png" for i in range(40)], labels=[i % 6 - 1 for i in range(40)],
                   picture=place / "picture.png", failed=[("bad.png", "is damaged")])
    report.write(out, workers=2)
    return out


def test_filters_and_orders(opened, made):
    page = opened(made)
    columns = data_of(made)["columns"]
    count = len(columns["image"])
    by_score = sorted(range(count), key=lambda i: -columns["score"][i])
    by_share = sorted(range(count), key=lambda i: columns["concentration"][i])
    assert page.names() == [f"{i:02}.png" for i in range(len(page.names()))]
    assert page.count() == "40"
    for order, wanted in (("score", by_score), ("-score", by_score[::-1]), ("-concentration", by_share),
                          ("concentration", by_share[::-1])):
        page.page.select_option("#sort", order)
        assert page.names()[:12] == [columns["file"][i] for i in wanted[:12]], order
    page.page.select_option("#class", str(columns["target"][0]))
    assert page.count() == f"{columns['target'].count(columns['target'][0])} of 40"
    page.page.select_option("#class", "")
    unknown = columns["label"].count(-1)
    wrong = 40 - unknown - sum(map(int.__eq__, columns["label"], columns["winner"]))
    for truth, wanted in (("wrong", wrong), ("unknown", unknown), ("right", 40 - wrong - unknown)):
        page.page.select_option("#truth", truth)
        assert page.count() == f"{wanted} of 40"
        assert page.page.locator(".mark").count() == (len(page.names()) if truth == "wrong" else 0)
    page.page.select_option("#truth", "")
    page.page.fill("#search", "1.PNG")
    assert sorted(page.names()) == ["01.png", "11.png", "21.png", "31.png"]
    page.page.fill("#search", "no such")
    assert page.page.is_visible("#none")


def test_thumbnails_are_seen(opened, made):
    """Sheets are found, and are let in by the policy."""
    page = opened(made)
    page.page.wait_for_load_state("networkidle")
    assert len([url for url in page.asked if url.endswith(".jfif")]) >= 3
    picture = page.page.locator("#grid .card .tile").first.screenshot()
    (made.parent / "seen.png").write_bytes(picture)
    seen = np.asarray(Image.open(made.parent / "seen.png").convert("RGB"))
    middle = seen[seen.shape[0] // 2, seen.shape[1] // 2]
    assert np.abs(middle.astype(int) - 120).max() < 8


def test_keyboard(opened, made):
    page = opened(made)
    keyboard = page.page.keyboard
    page.page.focus("#grid")
    across = page.page.evaluate("grid.across")
    assert across == 3
    for key, wanted in (("ArrowRight", 1), ("ArrowDown", 1 + across), ("ArrowLeft", across), ("ArrowUp", 0),
                        ("ArrowUp", 0), ("End", 39), ("ArrowDown", 39), ("ArrowUp", 36), ("Home", 0)):
        keyboard.press(key)
        assert page.active() == wanted, key
        assert page.page.get_attribute("#grid", "aria-activedescendant") == f"grid-{wanted}"
        assert page.page.locator(f"#grid-{wanted}").evaluate(
            "card => { const box = card.getBoundingClientRect(); return box.top >= 0 && box.bottom <= innerHeight }")
    outline = page.page.eval_on_selector(".card.active", "card => getComputedStyle(card).outlineStyle")
    assert outline == "solid"
    keyboard.press("Enter")
    assert page.page.is_visible("dialog")
    assert "00.png" in page.page.text_content("dialog")
    keyboard.press("ArrowRight")
    assert "01.png" in page.page.text_content("dialog")
    keyboard.press("Escape")
    page.page.wait_for_function("document.activeElement.id === 'grid'")
    assert not page.page.is_visible("dialog")
    assert page.active() == 1
    keyboard.press("/")
    page.page.wait_for_function("document.activeElement.id === 'search'")
    keyboard.type("07")
    page.page.wait_for_function("document.querySelector('#search').value === '07'")
    assert page.names() == ["07.png"]
    keyboard.press("Escape")
    page.page.wait_for_function("document.activeElement.id === 'grid'")
    assert page.count() == "40"
    page.page.focus("#tab-explanations")
    keyboard.press("ArrowRight")
    assert page.page.is_visible("#classes")
    page.page.focus("#class-grid")
    keyboard.press("Enter")
    assert page.page.is_visible("#grid")
    assert page.count().endswith("of 40")


def test_screen_readers_are_told(opened, made):
    page = opened(made)
    card = page.page.locator("#grid-5")
    assert card.get_attribute("role") == "option"
    assert (card.get_attribute("aria-posinset"), card.get_attribute("aria-setsize")) == ("6", "40")
    label = card.get_attribute("aria-label")
    assert label.startswith("05.png, ")
    assert "score" in label
    assert ("wrong, the true class is eel" in label) != (label.endswith("right"))
    named = page.page.eval_on_selector_all("button, input, select, [role=listbox]", """all => all.map(
        one => one.getAttribute("aria-label") || one.tagName === "BUTTON" && one.textContent.trim())""")
    assert len(named) == 9
    assert all(named)


def test_what_was_run_is_shown(opened, made):
    page = opened(made)
    page.page.click("#tab-run")
    text = page.page.text_content("#run")
    for wanted in ("bad.png", "is damaged", "zplus", "stretch", "0" * 64, "float32", "40", "10 % of pixels"):
        assert wanted in text, wanted


def test_dark_and_light(opened, made):
    backs = [opened(made, color_scheme=scheme).page.evaluate("getComputedStyle(document.body).backgroundColor")
             for scheme in ("light", "dark")]
    light, dark = (sum(map(int, re.findall(r"\d+", back)[:3])) for back in backs)
    assert light > 600
    assert dark < 150


def test_narrow_window(opened, made):
    page = opened(made, viewport={"width": 360, "height": 700})
    assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.page.focus("#grid")
    page.page.keyboard.press("Enter")
    assert page.page.evaluate("document.querySelector('dialog').scrollWidth <= innerWidth")


def test_gone_is_said(opened, tmp_path):
    out = make_run(tmp_path / "out", ["a.png", "b.png"])
    report.write(out)
    page = opened(out)
    assert "cannot be read" in page.page.text_content("#gone")
    assert page.page.locator("text=picture is gone").count() == 2


def test_hostile_names_do_nothing(opened, tmp_path):
    out = hostile_run(tmp_path / "</script><b>out")
    report.write(out)
    page = opened(out, viewport={"width": 1320, "height": 4000})
    page.page.click("#tab-run")
    page.page.click("#tab-classes")
    page.page.click("#tab-explanations")
    page.page.focus("#grid")
    page.page.keyboard.press("Enter")
    assert page.page.title() == "script><b>out - fastdtd report"
    assert page.page.locator("img, script:not([type]), #run b, h1 b").count() == 1  # the page's own script
    assert HOSTILE[0] in page.page.text_content("#class-grid")
    assert HOSTILE[1] in page.page.text_content("#run")


def test_empty_run_opens(opened, tmp_path):
    out = make_run(tmp_path / "out", [], failed=[("a.png", "is damaged")])
    report.write(out)
    page = opened(out)
    assert page.page.is_visible("#none")
    page.page.keyboard.press("/")
    page.page.focus("#grid")
    for key in ("ArrowDown", "Enter", "End"):
        page.page.keyboard.press(key)
    page.page.click("#tab-classes")


@pytest.mark.slow
def test_ten_thousand_stay_quick(opened, tmp_path, monkeypatch, capsys):
    """Times are printed, not asserted; that few cards are in the document is."""
    monkeypatch.setattr(report, "TILE", 24)
    out = make_run(tmp_path / "out", [f"{i:05}.png" for i in range(10_000)], labels=np.arange(10_000) % 5)
    report.write(out, workers=2)
    begun = time.perf_counter()
    page = opened(out)
    assert page.count() == "10,000"
    times = {"open": time.perf_counter() - begun}

    def timed(name, action, wanted):
        begun = time.perf_counter()
        action()
        assert page.count() == wanted
        times[name] = time.perf_counter() - begun

    timed("search", lambda: page.page.fill("#search", "0777"), "11 of 10,000")
    timed("search cleared", lambda: page.page.fill("#search", ""), "10,000")
    timed("sort", lambda: page.page.select_option("#sort", "concentration"), "10,000")
    page.page.focus("#grid")
    timed("to the end", lambda: page.page.keyboard.press("End"), "10,000")
    assert page.active() == 9_999
    assert page.page.locator(".card").count() < 60
    with capsys.disabled():
        print("\n10,000 explanations:", *(f"{name} {1000 * spent:.0f} ms," for name, spent in times.items()))
