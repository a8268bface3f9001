"""What ViRelAy is given: embeddings and clusters of heatmaps, images and names. tests/virelay opens it there."""

import contextlib
import errno
import json
import re
import sys
import tarfile
import time
from collections import Counter

import h5py
import numpy as np
import pytest
from PIL import Image

import fastdtd
from fastdtd import analysis, cli, files, images, results, runner, sources
from fastdtd import graph as g
from fastdtd.errors import InputError, OutputError
from fastdtd.explainer import Explainer
from fastdtd.model import Model, Preprocessing

pytest.importorskip("sklearn.cluster")
SIDE = 8
CLASSES = ("ant", "bee", "cat", "dog")
WRITTEN = (analysis.ANALYSIS, analysis.INPUT, analysis.LABEL_MAP, analysis.PROJECT)


@pytest.fixture(scope="module")
def explainer():
    """Its scores are the means of the four quarters of a picture."""
    kernel = np.zeros((4, 3, SIDE, SIDE))
    for i in range(4):
        kernel[i, :, 4 * (i // 2):4 * (i // 2) + 4, 4 * (i % 2):4 * (i % 2) + 4] = 1 / 48
    layers = g.Flatten("flat", ("input", )), g.Dense("scores", ("flat", ), kernel.reshape(4, -1))
    return Explainer(Model(g.Graph(layers, (3, SIDE, SIDE), (0.0, 1.0)), Preprocessing("rgb", "crop", scale=1 / 255),
                           CLASSES), threads=2)


def save_pictures(folder, classes, spots=2):
    """Pictures of which a quarter is bright, that of the class, in one of so many places."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i, number in enumerate(classes):
        pixels = rng.integers(0, 20, (SIDE, 2 * SIDE, 3), np.uint8)
        top, left = 4 * (number // 2), 4 + 4 * (number % 2)  # of the middle, which is what is seen
        spot = i // len(CLASSES) % spots
        pixels[top + 2 * spot:top + 2 * spot + 2, left:left + 4] += 200
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def made_run(explainer, out, source, **options):
    runner.run(explainer, sources.find([source]), out, outputs=["relevance"], **{"shard": 5, **options})
    return out


@pytest.fixture(scope="module")
def run(explainer, tmp_path_factory):
    """24 pictures, six of a class."""
    place = tmp_path_factory.mktemp("analysis")
    return made_run(explainer, place / "run", save_pictures(place / "set", [i % 4 for i in range(24)]))


def all_of(path):
    """Names and values of all datasets of a file."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[...]}) if isinstance(item, h5py.Dataset) else None)
    return found


def test_every_class_has_the_same_embeddings_and_clusterings(run):
    made = fastdtd.analyze(run)
    assert (made.project, made.classes, made.rows, made.left_out, made.failed) == (run / "project.yaml", 4, 24, 0, [])
    found = all_of(run / analysis.ANALYSIS)
    names = {"index", "embedding/pca", "embedding/spectral", *(f"cluster/kmeans-{k:02}" for k in range(2, 9))}
    assert {*found} == {f"{number}/{name}" for number in range(4) for name in names}
    for number in range(4):
        assert found[f"{number}/index"].tolist() == list(range(number, 24, 4))
        for name in names:
            values = found[f"{number}/{name}"]
            assert len(values) == 6
            assert np.isfinite(values).all()
        assert found[f"{number}/embedding/pca"].shape[1] in range(2, 9)
        # Two places, by turns, are two clusters; in each the largest one comes first.
        assert found[f"{number}/cluster/kmeans-02"].tolist() in ([0, 1] * 3, [1, 0] * 3)
        for k in range(2, 9):
            sizes = np.bincount(found[f"{number}/cluster/kmeans-{k:02}"])
            assert sizes.tolist() == sorted(sizes, reverse=True)
            assert 2 <= len(sizes) <= k
            assert sizes.min() > 0
    with h5py.File(run / analysis.ANALYSIS) as file:
        for name in ("pca", "spectral"):
            values = file[f"0/embedding/{name}"].attrs["eigenvalue"]
            assert values.tolist() == (sorted(values) if name == "pca" else sorted(values, reverse=True))


def test_images_are_as_the_network_saw_them(run, explainer):
    fastdtd.analyze(run)
    found, entries = all_of(run / analysis.INPUT), sources.find([run.parent / "set"])
    assert found["data"].dtype == np.uint8
    assert found["data"].shape == (24, SIDE, SIDE, 3)
    for entry, pixels in zip(entries, found["data"], strict=True):
        seen = images.read(entry.path, (3, SIDE, SIDE), "rgb", "crop")
        np.testing.assert_array_equal(pixels, seen.transpose(1, 2, 0))
    assert found["label"].tolist() == [-1] * 24


def test_names_of_classes_and_one_for_no_label(run):
    fastdtd.analyze(run)
    found = json.loads((run / analysis.LABEL_MAP).read_text())
    assert [(one["index"], one["word_net_id"], one["name"]) for one in found] == [
        (-1, "-", "no true label"), *((i, str(i), name) for i, name in enumerate(CLASSES))]


def test_the_same_bytes_every_time(run):
    before = {}
    for _ in range(2):
        for name in WRITTEN:
            (run / name).unlink(missing_ok=True)
        fastdtd.analyze(run)
        after = {name: (run / name).read_bytes() for name in WRITTEN}
        assert before in ({}, after)
        before = after
        time.sleep(1.1 - time.time() % 1)  # HDF5 notes seconds
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_images_are_read_once(run, monkeypatch):
    fastdtd.analyze(run)
    monkeypatch.setattr(sources, "open_image", None)
    fastdtd.analyze(run, "predicted")


@pytest.fixture
def one_thread():
    """As `analyze` has it: with more, small problems wait for threads."""
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        yield


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 300])
@pytest.mark.parametrize("kind", ["any", "same", "zero", "two kinds"])
def test_classes_of_any_size(count, kind):
    """All that is possible: clusters, and finite points that are not all in the origin, where ViRelAy draws none."""
    rng = np.random.default_rng(0)
    maps = {"any": rng.random((count, 3, 10, 12)), "same": np.ones((count, 3, 10, 12)),
            "zero": np.zeros((count, 3, 10, 12)),
            "two kinds": rng.random((count, 3, 10, 12)) * (np.indices((count, 3, 10, 12))[0] % 2 * 2 - 1)}[kind]
    heatmaps = analysis._reduced(maps.astype(np.float32))
    assert heatmaps.shape == (count, 120)
    for points, eigenvalues in analysis._embeddings(heatmaps).values():
        assert points.shape[0] == count
        assert 2 <= points.shape[1] <= 8
        assert points.any()
        assert np.isfinite(points).all()
        assert np.isfinite(eigenvalues).all()
        for k in (2, 8):
            clusters = analysis._clusters(points, k)
            assert {*clusters.tolist()} == {*range(clusters.max() + 1)}
            assert clusters.max() < min(k, count)
        if kind == "two kinds" and count > 3:
            assert len({*analysis._clusters(points, 2)[::2]}) == len({*analysis._clusters(points, 2)[1::2]}) == 1


@pytest.mark.parametrize(("shape", "reduced"), [((1, 5), (1, 5)), ((32, 32), (32, 32)), ((33, 227), (32, 32)),
                                                ((227, 8), (32, 8))])
def test_heatmaps_are_reduced_by_averaging(shape, reduced):
    rng = np.random.default_rng(0)
    relevance = (rng.random((2, 3, *shape)) - 0.2).astype(np.float32) * np.float32([1e-30, 1e30])[:, None, None, None]
    found = analysis._reduced(relevance)
    rows, columns = ([slice(length * i // parts, length * (i + 1) // parts) for i in range(parts)]
                     for length, parts in zip(shape, reduced, strict=True))
    for one, small in zip(relevance.astype(np.float64).sum(1), found, strict=True):
        wanted = np.array([[one[row, column].mean() for column in columns] for row in rows])
        np.testing.assert_allclose(small.reshape(reduced), wanted / np.linalg.norm(wanted), rtol=1e-4, atol=1e-6)


def test_classes_by_target_prediction_and_label(explainer, tmp_path):
    classes = [0, 0, 0, 1, 1, 2]
    save_pictures(tmp_path / "set", classes)
    labels = ["ant", "bee", "", "bee", "3", "eel"]  # the last is no class
    (tmp_path / "set.csv").write_text("".join(f"set/{i:02}.png,{label}\n" for i, label in enumerate(labels)))
    out = made_run(explainer, tmp_path / "run", tmp_path / "set.csv", top=2)
    run = results.open_results(out)

    def sizes(by):
        made = fastdtd.analyze(out, by)
        found = {int(name[0]): values.tolist() for name, values in all_of(out / analysis.ANALYSIS).items()
                 if name.endswith("index")}
        assert (made.classes, made.rows) == (len(found), sum(map(len, found.values())))
        assert made.left_out == 12 - made.rows
        return found

    targets = run.columns["target"].tolist()
    assert sizes("target") == {c: [i for i in range(12) if targets[i] == c] for c in sorted({*targets})}
    assert sizes("predicted") == {0: [0, 1, 2, 3, 4, 5], 1: [6, 7, 8, 9], 2: [10, 11]}
    assert sizes("label") == {0: [0, 1], 1: [2, 3, 6, 7], 3: [8, 9]}
    # Of two heatmaps of an image each has the image as its own, though it is stored once.
    found = all_of(out / analysis.INPUT)
    np.testing.assert_array_equal(found["data"][::2], found["images"])
    np.testing.assert_array_equal(found["data"][1::2], found["images"])
    assert (out / analysis.INPUT).stat().st_size < 12 * 3 * SIDE**2 + 8192


@pytest.mark.parametrize("storage", [results.Storage(dtype, channels, compression)
                                     for dtype, channels, compression in
                                     [("float16", True, None), ("int8", True, "gzip"), ("float32", False, None),
                                      ("int8", False, "lzf")]])
def test_however_relevance_is_stored(run, explainer, tmp_path, storage):
    fastdtd.analyze(run)
    other = made_run(explainer, tmp_path / "run", run.parent / "set", storage=storage, shard=100)
    fastdtd.analyze(other)
    wanted, found = all_of(run / analysis.ANALYSIS), all_of(other / analysis.ANALYSIS)
    for number in range(4):
        np.testing.assert_array_equal(found[f"{number}/cluster/kmeans-02"], wanted[f"{number}/cluster/kmeans-02"])
        np.testing.assert_allclose(np.abs(found[f"{number}/embedding/pca"][:, 0]),
                                   np.abs(wanted[f"{number}/embedding/pca"][:, 0]), atol=0.02)


def test_memory_is_bounded(run, monkeypatch):
    """A few rows and images are in memory at a time, and of a class no more than are compared."""
    asked = Counter()
    whole = results.Results.__getitem__

    def watched(self, row):
        asked[len(range(*row.indices(len(self))))] += 1
        return whole(self, row)

    monkeypatch.setattr(results.Results, "__getitem__", watched)
    monkeypatch.setattr(analysis, "_BLOCK_BYTES", 3 * 4 * 3 * SIDE**2)
    monkeypatch.setattr(analysis, "_MOST", 4)
    made = fastdtd.analyze(run)
    assert {*asked} <= {0, 3}
    assert (made.rows, made.left_out) == (16, 8)
    assert all_of(run / analysis.ANALYSIS)["1/index"].tolist() == [1, 5, 13, 21]


def test_other_sources_than_files(explainer, tmp_path):
    """images.csv says where in a file an image is."""
    save_pictures(tmp_path / "set", [0, 1, 2, 3])
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "set", "set")
    with h5py.File(tmp_path / "set.h5", "w") as file:
        file["x/images"] = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "set").iterdir())])
    found = []
    for source in ("set", "set.tar", "set.h5"):
        out = made_run(explainer, tmp_path / f"run-{source}", tmp_path / source)
        assert not fastdtd.analyze(out).failed
        found.append(all_of(out / analysis.INPUT)["data"])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_images_that_are_gone_are_gray_until_they_are_back(explainer, tmp_path, capsys):
    folder = save_pictures(tmp_path / "set", [0, 1, 2])
    out = made_run(explainer, tmp_path / "run", folder)
    (folder / "01.png").rename(tmp_path / "01.png")
    assert cli.main(["analyze", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"3 heatmaps in 3 classes; see them with: virelay {out}/project.yaml\n"
    assert re.search(r"gray in input\.h5: 01\.png: picture '.*01\.png' does not exist", printed.err)
    assert (all_of(out / analysis.INPUT)["data"][1] == 127).all()
    (tmp_path / "01.png").rename(folder / "01.png")
    assert cli.main(["analyze", str(out)]) == 0
    assert (all_of(out / analysis.INPUT)["data"][1] != 127).any()


def test_failed_images_have_no_row(explainer, tmp_path):
    folder = save_pictures(tmp_path / "set", [0, 1, 2])
    (folder / "00.png").write_bytes(b"no picture")
    out = made_run(explainer, tmp_path / "run", folder, top=2)
    assert fastdtd.analyze(out).rows == 4
    assert len(all_of(out / analysis.INPUT)["data"]) == 4


@pytest.mark.parametrize("name", ["run", "Zürich 🐟", 'a "b": c#', "- x", "tab\there"])
def test_any_folder_can_be_a_projects_name(explainer, tmp_path, name):
    out = made_run(explainer, tmp_path / name, save_pictures(tmp_path / "set", [0]))
    text = fastdtd.analyze(out).project.read_text(encoding="utf-8")
    [said] = {match[1] for match in re.finditer(r"^ +name: (.*)$", text, re.MULTILINE)}
    assert json.loads(said) == name.replace("\t", r"\t")
    assert text.isascii() == name.isascii()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_leaves_what_was_there(explainer, tmp_path, monkeypatch, name):
    out = made_run(explainer, tmp_path / "run", save_pictures(tmp_path / "set", [0, 1]))
    fastdtd.analyze(out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (out / analysis.INPUT).unlink()  # so that it is made again
    whole = files.replacing

    @contextlib.contextmanager
    def replacing(path):
        with whole(path) as beside:
            yield beside
            if path.name == name:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "replacing", replacing)
    with pytest.raises(OutputError, match=r"cannot write to .*: No space left on device; required: a folder"):
        fastdtd.analyze(out)
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert {**before, **after} == before
    assert {*before} - {*after} <= {analysis.INPUT}


def test_a_killed_analysis_leaves_nothing_for_the_next(explainer, tmp_path):
    out = made_run(explainer, tmp_path / "run", save_pictures(tmp_path / "set", [0, 1]))
    for name in WRITTEN:
        (out / f".{name}.{'0' * 32}").write_bytes(b"half of it")
    fastdtd.analyze(out)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_what_cannot_be_analyzed(run, explainer, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"by 'class'; required: one of target, predicted, label"):
        fastdtd.analyze(run, "class")
    with pytest.raises(InputError, match=r"no image of .* has a true label .*required: a set with labels"):
        fastdtd.analyze(run, "label")
    with pytest.raises(OutputError, match=r"has no manifest\.json; required: the output folder of a run"):
        fastdtd.analyze(tmp_path)
    folder = save_pictures(tmp_path / "set", [0, 1])
    runner.run(explainer, sources.find([folder]), tmp_path / "numbers", outputs=["heatmap"], draw=0)
    with pytest.raises(OutputError, match="did not keep relevance"):
        fastdtd.analyze(tmp_path / "numbers")
    out = made_run(explainer, tmp_path / "run", folder, shard=1)
    (out / results.RESULT).rename(tmp_path / "result")
    with pytest.raises(OutputError, match=r"attribution\.h5' cannot be read .*start the same run again"):
        fastdtd.analyze(out)
    (tmp_path / "result").rename(out / results.RESULT)
    with files.FolderLock(out), pytest.raises(OutputError, match=r"another process is writing to .*: process "):
        fastdtd.analyze(out)
    results.shard_path(out, 1).unlink()
    with pytest.raises(OutputError, match=r"has 1 of 2 shards whole, and 00001\.h5 is missing"):
        fastdtd.analyze(out)
    assert not any((out / name).exists() for name in WRITTEN)
    for picture in folder.iterdir():
        picture.write_bytes(b"no picture")
    none = made_run(explainer, tmp_path / "none", folder)
    with pytest.raises(OutputError, match="has no heatmap: all 2 images failed"):
        fastdtd.analyze(none)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"scikit-learn; required: pip install \"fastdtd\[analysis\]\""):
        fastdtd.analyze(run)
