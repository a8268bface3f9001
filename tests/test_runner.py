"""Runs over many pictures: all results right and whole, whatever the pictures, the disk, or the moment a run is killed.
"""

import contextlib
import csv
import dataclasses
import errno
import gc
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from PIL import Image

from fastdtd import files, heatmap, images, results, runner, sources
from fastdtd import graph as g
from fastdtd import shards as shard_maker
from fastdtd.errors import InputError, OutputError
from fastdtd.explainer import Explainer
from fastdtd.model import Model, Preprocessing
from fastdtd.model_file import save
from fastdtd.warmup import warm_up

COMMAND = "import sys; from fastdtd.cli import main; sys.exit(main())"
# Kills itself with SIGKILL in place of the n-th change to a folder.
DYING = """
import os, pathlib, signal, sys
left = int(sys.argv.pop(1))
def dying(change):
    def count(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*arguments, **options)
    return count
os.replace, os.unlink = dying(os.replace), dying(os.unlink)
pathlib.Path.unlink = lambda path: os.unlink(path)  # Python 3.10's holds on to the os.unlink that it was imported with
""" + COMMAND


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """All on disk: what runs write, and say, is theirs alone."""
    warm_up()


def small_model(resize="stretch", box=(0.0, 1.0), seed=0):
    rng = np.random.default_rng(seed)
    layers = (g.Conv2d("conv", ("input", ), rng.standard_normal((6, 3, 3, 3)), 0.1 * rng.standard_normal(6),
                       padding=(1, 1, 1, 1)), g.ReLU("relu",
                                                     ("conv", )), g.MaxPool2d("pool", ("relu", ), (2, 2), (2, 2)),
              g.Flatten("flat", ("pool", )), g.Dense("scores", ("flat", ),
                                                     rng.standard_normal((5, 6 * 8 * 8)) + 0.3))
    return Model(g.Graph(layers, (3, 16, 16), box), Preprocessing("rgb", resize, scale=1 / 255),
                 ("ant", "bee", "cat", "dog", "eel"))


def explainer(threads=2, **options):
    return Explainer(small_model(**options), threads=threads)


def test_through_channels(tmp_path, capsys):
    from fastdtd import cli

    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{i}.png")
    made = explainer()
    entries = sources.find([str(tmp_path)])
    runner.run(made, entries, tmp_path / "out", through={"conv": [1, 4], "relu": [0, 1, 4]})
    e = made([tmp_path / f"{i}.png" for i in range(3)], through={"conv": [1, 4], "relu": [0, 1, 4]})
    run = results.open_results(tmp_path / "out")
    np.testing.assert_allclose(run[:], e.relevance, atol=1e-6)
    np.testing.assert_allclose(run.columns["cut"], e.cut["conv"] + e.cut["relu"])
    assert run.columns["cut"].min() > 0
    assert not results.verify(tmp_path / "out").troubles
    save(made.model, tmp_path / "net.h5")
    arguments = ["explain", str(tmp_path / "net.h5"), str(tmp_path / "0.png"), "-o", str(tmp_path / "more")]
    assert cli.main([*arguments, "--through", "conv=1,4", "--through", "relu=0,1,4"]) == 0
    assert f"through other channels {run.columns['cut'][0]:.6g}" in capsys.readouterr().out
    for wrong, message in (("conv=6", "channel 6"), ("con=1", "no layer 'con'")):
        assert cli.main([*arguments, "--through", wrong]) != 0
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--through", "conv"])
    assert "'conv' is no LAYER=CHANNELS" in capsys.readouterr().err
    assert cli.main([*arguments, "--through", "conv=1"]) != 0
    assert "through conv was" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    """Ten pictures, two of them in a folder below."""
    place = tmp_path / "pictures"
    (place / "below").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(place /
                                                                              ("below" if i < 2 else ".") / f"{i}.png")
    return place


@pytest.fixture
def model(tmp_path):
    save(small_model(), tmp_path / "model.h5")
    return tmp_path / "model.h5"


def read(out):
    with h5py.File(out / results.RESULT, "r") as file:
        return {
            name: values.asstr()[...] if h5py.check_string_dtype(values.dtype) else values[...]
            for name, values in file.items()
        }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, name)


def left_over(out):
    """What is no part of a finished run."""
    of_a_run = {results.MANIFEST, results.SET, results.RESULT, results.SCORES, results.FAILED}
    return [p.name for p in out.rglob("*") if p.is_file() and p.name not in of_a_run and p.parent.name != results.SHARDS
            and not p.name.endswith(".png")]


def shards(out):
    return sorted((out / results.SHARDS).glob("[0-9]*.h5"))


def assert_same_files(found, wanted):
    """All of two finished runs, byte for byte."""
    names = sorted(p.relative_to(wanted) for p in wanted.rglob("*"))
    assert names == sorted(p.relative_to(found) for p in found.rglob("*"))
    for name in names:
        if (wanted / name).is_file():
            assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


def fastdtd(*arguments, code=COMMAND, **options):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          check=False, timeout=100, **options)


def test_results(folder, tmp_path):
    out = tmp_path / "new" / "out"
    made, lines, steps = explainer(), [], []
    summary = runner.run(made, sources.find([folder]), out, batch=3, shard=4, on_line=lines.append,
                         on_progress=steps.append)
    assert (summary.explained, summary.done_before, summary.failed, summary.clipped) == (10, 0, [], None)
    assert steps == [0, 3, 1, 3, 1, 2]
    names = ["2.png", "3.png", "4.png", "5.png", "6.png", "7.png", "8.png", "9.png", "below/0.png", "below/1.png"]
    found = read(out)
    assert found["file"].tolist() == [line.name for line in lines] == names
    e = made(np.stack([made.model.preprocess(folder / name) for name in names]))
    for name, values in {
            "attribution": e.relevance, "prediction": e.output, "target": e.target, "explained": e.explained,
            "absorbed": e.absorbed, "sum": e.relevance.sum((1, 2, 3), dtype=float), "classes": made.model.classes,
            "score": e.output.max(1), "image": range(10), "label": [-1] * 10, "rank": [0] * 10, "scale": [1] * 10,
            "ledger": np.stack([*e.ledger.values()], 1),
    }.items():
        np.testing.assert_array_equal(found[name], values)
    manifest = json.loads((out / results.MANIFEST).read_text())
    assert manifest["rules"] == {"conv": "zB", "pool": "winner", "scores": "z+"}
    for line, score, absorbed in zip(lines, e.output.max(1), e.absorbed, strict=True):
        assert line.class_name == made.model.classes[line.target]
        assert line.score == score
        assert line.relevance + line.absorbed == pytest.approx(score, rel=1e-4)
        assert line.absorbed == absorbed
        assert list(line.ledger) == list(e.ledger)
    for i, name in enumerate(names):
        with Image.open(out / f"{name}.heatmap.png") as drawn:
            np.testing.assert_array_equal(drawn, heatmap.draw(e.relevance[i]))
        with Image.open(out / f"{name}.overlay.png") as drawn:
            np.testing.assert_array_equal(drawn, heatmap.draw(e.relevance[i], images.open_picture(folder / name)))
    assert left_over(out) == []
    assert len(shards(out)) == 3
    with open(out / results.SCORES, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == names
    assert [row["class"] for row in rows] == [line.class_name for line in lines]
    np.testing.assert_allclose([float(row["score"]) for row in rows], e.output.max(1), rtol=1e-6)


def test_images_at_a_time(folder, tmp_path):
    """Unless it is said: on GPUs as many as they take at once, if that is more."""
    for precision, each, wanted in (("", 7, [10]), ("fp32", 3, [10]), ("fp32", 9, [10]), ("tf32", 9, [18, 2])):
        made, steps = explainer(), []
        made.precision, made._executor.batch = precision, each
        entries = sources.find([folder]) * (2 if precision == "tf32" else 1)
        runner.run(made, [dataclasses.replace(entry, name=f"{i}") for i, entry in enumerate(entries)],
                   tmp_path / f"{each}{precision}", on_progress=steps.append, outputs=["heatmap"])
        assert made.at_once == 2 * each
        assert steps == [0, *wanted]


TARGETS = {
    "one": ({"target": "bee"}, [[1]] * 10), "several": ({"target": ["eel", 0]}, [[4, 0]] * 10),
    "of an array": ({"target": np.array([2])}, [[2]] * 10), "the highest": ({"top": 3}, None),
    "all": ({"top": 5}, None),
}


@pytest.mark.parametrize(("options", "wanted"), TARGETS.values(), ids=TARGETS.keys())
def test_targets(folder, tmp_path, options, wanted):
    made = explainer()
    entries = sources.find([folder])
    summary = runner.run(made, entries, tmp_path, batch=4, shard=6, **options)
    found = results.open_results(tmp_path)
    pixels = np.stack([made.model.preprocess(entry.path) for entry in entries])
    if wanted is None:
        wanted = np.argsort(-made(pixels).output, 1)[:, :options["top"]].tolist()
    assert summary.explained == 10
    assert found.columns["target"].reshape(10, -1).tolist() == wanted
    each = len(wanted[0])
    assert found.columns["image"].tolist() == np.repeat(range(10), each).tolist()
    assert found.columns["rank"].tolist() == list(range(each)) * 10
    for rank in range(each):
        e = made(pixels, [targets[rank] for targets in wanted])
        np.testing.assert_array_equal(found[rank::each], e.relevance)
        np.testing.assert_array_equal(found.columns["score"][rank::each], e.output[range(10), e.target])


def test_true_labels(folder, tmp_path):
    labels = ["ant", "4", "", "5", "no class", "bee", "0", "-1", "cat", "dog"]
    entries = [dataclasses.replace(entry, label=label) for entry, label in zip(sources.find([folder]), labels,
                                                                               strict=True)]
    summary = runner.run(explainer(), entries, tmp_path, true_label=True)
    found = results.open_results(tmp_path)
    assert found.columns["target"].tolist() == found.columns["label"].tolist() == [0, 4, 1, 0, 2, 3]
    assert [os.path.basename(path) for path, _ in summary.failed] == ["4.png", "5.png", "6.png", "9.png"]
    reasons = [reason for _, reason in summary.failed]
    assert "has no label" in reasons[0]
    assert "target 5 is not an output" in reasons[1]
    assert "no class is named 'no class'" in reasons[2]
    with open(tmp_path / results.FAILED, newline="") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == reasons
    runner.run(explainer(), entries, tmp_path / "winners")  # labels are kept, where there are some
    assert results.open_results(tmp_path / "winners").columns["label"].tolist() == [0, 4, -1, -1, -1, 1, 0, -1, 2, 3]


STORAGES = {
    "float16": (results.Storage("float16"), 2**-11), "int8": (results.Storage("int8"), None),
    "summed": (results.Storage(channels=False), 0), "gzip": (results.Storage(compression="gzip"), 0),
    "all": (results.Storage("int8", channels=False, compression="lzf"), None),
}


@pytest.mark.parametrize(("keep", "channels"), [(0.5, True), (0.9, False), (1e-9, True), (1 - 1e-9, True)])
def test_the_largest_are_kept(folder, tmp_path, keep, channels):
    made = explainer()
    entries = sources.find([folder])
    storage = results.Storage(channels=channels, compression="gzip", keep=keep)
    runner.run(made, entries, tmp_path, storage=storage, shard=3)
    relevance = made([entry.path for entry in entries]).relevance
    if not channels:
        relevance = relevance.sum(1, keepdims=True, dtype=float).astype("f4")
    found = results.open_results(tmp_path)
    for one, wanted in zip(found, relevance, strict=True):
        kept = one != 0
        np.testing.assert_array_equal(one[kept], wanted[kept])
        assert wanted[~kept].max(initial=0) < wanted[kept].min()
        assert one.sum(dtype=float) >= keep * wanted.sum(dtype=float) * (1 - 1e-6)
        assert one.sum(dtype=float) - wanted[kept].min() <= keep * wanted.sum(dtype=float) * (1 + 1e-6)
    assert results.verify(tmp_path).troubles == []


@pytest.mark.parametrize(("storage", "error"), STORAGES.values(), ids=STORAGES.keys())
def test_storage(folder, tmp_path, storage, error):
    made = explainer()
    entries = sources.find([folder])
    runner.run(made, entries, tmp_path, storage=storage, shard=3)
    relevance = made(np.stack([made.model.preprocess(entry.path) for entry in entries])).relevance
    if not storage.channels:
        relevance = relevance.sum(1, keepdims=True, dtype=float).astype("f4")
    found = results.open_results(tmp_path)
    assert found[:].dtype == np.float32
    for one, wanted in zip(found, relevance, strict=True):
        bound = np.abs(wanted).max() / 253 if error is None else error * np.abs(wanted) + 2**-24 * bool(error)
        assert (np.abs(one - wanted) <= bound).all()
    with h5py.File(tmp_path / results.RESULT) as file:
        assert file["attribution"].dtype == storage.dtype
        assert file["attribution"].shape == (10, 3 if storage.channels else 1, 16, 16)
    assert results.verify(tmp_path).troubles == []


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1.8e-43, 1e-40, 3e38])
def test_int8_of_any_size(largest):
    relevance = np.linspace(-largest, largest, 48, dtype="f4").reshape(1, 3, 4, 4)
    stored, scale = results.Storage("int8").stored(relevance)
    assert stored.dtype == np.int8
    assert np.isfinite(scale).all()
    assert (np.abs(stored * scale - relevance) <= max(largest / 253, 1e-43)).all()


def test_relevance_beyond_float16(folder, tmp_path):
    small = small_model()
    *others, dense = small.graph.layers
    dense = g.Dense("scores", ("flat", ), dense.weight * 1e6)
    model = Model(g.Graph((*others, dense), (3, 16, 16), (0, 1)), small.preprocessing)
    summary = runner.run(Explainer(model, threads=1), sources.find([folder]), tmp_path,
                         storage=results.Storage("float16"))
    assert len(summary.failed) == 10
    assert "has relevance beyond float16; required: float32 or int8" in summary.failed[0][1]
    assert not (tmp_path / results.RESULT).exists()


def test_many_workers_make_the_same_bytes(folder, tmp_path):
    for i, (threads, options) in enumerate([(2, {}), (1, {"workers": 5, "batch": 1}), (1, {"workers": 2, "batch": 3}),
                                            (1, {"executor": True})]):
        entries = sources.find([folder])
        with ThreadPoolExecutor(3) as executor:
            given = options | ({"executor": executor} if "executor" in options else {})
            assert runner.run(explainer(threads), entries, tmp_path / f"{i}", shard=4, **given).explained == 10
        if "executor" in options:
            (tmp_path / f"{i}" / "model.h5").unlink()
        assert_same_files(tmp_path / f"{i}", tmp_path / "0")


@pytest.mark.parametrize("kind", ["list", "tar", "HDF5", "folders"])
def test_sets_of_every_kind(folder, tmp_path, kind):
    """The same relevance as of the pictures themselves, and their labels."""
    names = [entry.path for entry in sources.find([folder])]
    labels = ["ant", "bee", "cat", "dog", "eel"] * 2
    source = tmp_path / {"list": "set.csv", "tar": "set.tar", "HDF5": "set.h5", "folders": "tree"}[kind]
    pixels = [np.asarray(Image.open(name).resize((16, 16))) for name in names]
    given = tmp_path / "resized"
    given.mkdir()
    paths = []
    for i, one in enumerate(pixels):
        paths.append(given / f"{i}.png")
        Image.fromarray(one).save(paths[-1])
    match kind:
        case "list":
            source.write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in zip(
                paths, labels, strict=True)))
        case "tar":
            with tarfile.open(source, "w") as tar:
                for i, (path, label) in enumerate(zip(paths, labels, strict=True)):
                    tar.add(path, f"{i}.png")
                    info = tarfile.TarInfo(f"{i}.cls")
                    info.size = len(label)
                    tar.addfile(info, io.BytesIO(label.encode()))
        case "HDF5":
            with h5py.File(source, "w") as file:
                file["images"], file["label"] = np.stack(pixels), labels
        case "folders":
            for path, label in zip(paths, labels, strict=True):
                (source / label).mkdir(parents=True, exist_ok=True)
                (source / label / path.name).write_bytes(path.read_bytes())
    entries = sources.find([source], labels=kind == "folders")
    made = explainer()
    assert runner.run(made, entries, tmp_path / "out", true_label=True, shard=4, batch=3).explained == 10
    found = results.open_results(tmp_path / "out")
    order = sorted(range(10), key=lambda i: labels[i]) if kind == "folders" else range(10)
    assert [made.model.classes[label] for label in found.columns["target"]] == [labels[i] for i in order]
    wanted = made([paths[i] for i in order], found.columns["target"])
    np.testing.assert_array_equal(found[:], wanted.relevance)
    assert results.verify(tmp_path / "out").troubles == []


@pytest.mark.parametrize(("count", "drawn"), [(0, 0), (3, 3), (None, 10), (100, 10)])
def test_drawings_of_the_first(folder, tmp_path, count, drawn):
    runner.run(explainer(), sources.find([folder]), tmp_path, draw=count)
    for kind in ("heatmap", "overlay"):
        assert len(list(tmp_path.rglob(f"*.{kind}.png"))) == drawn
    assert len(read(tmp_path)["file"]) == 10


def test_batches_are_not_kept(folder, tmp_path):
    """However many there are, few are in memory at a time."""
    entry = sources.find([folder / "5.png"])[0]
    entries = [dataclasses.replace(entry, name=f"{i}") for i in range(200)]
    counts = []

    def on_progress(count):
        counts.append(sum(type(one) is shard_maker.Batch for one in gc.get_objects()))

    runner.run(explainer(), entries, tmp_path, draw=0, batch=2, workers=2, on_progress=on_progress)
    assert len(counts) == 101
    assert max(counts) <= 8


def test_what_each_stage_takes(folder, tmp_path):
    summary = runner.run(explainer(), sources.find([folder]), tmp_path, draw=0)
    assert list(summary.seconds) == list(shard_maker.STAGES)
    assert all(summary.seconds[stage] > 0 for stage in ("read", "prepare", "explain", "store", "write"))
    assert summary.elapsed > summary.seconds["write"]


def test_overlay_shows_what_the_network_saw(tmp_path):
    photo = Image.new("RGB", (3000, 1000), "white")  # the network's part is the middle third, turned upright
    photo.paste("black", (1000, 0, 2000, 1000))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.png", exif=exif)
    runner.run(explainer(resize="crop"), sources.find([tmp_path / "a.png"]), tmp_path / "out", target=0)
    with Image.open(tmp_path / "out" / "a.png.overlay.png") as drawn:
        assert drawn.height == 1000
        assert np.percentile(np.asarray(drawn)[:, :1000, 2], 95) < 200  # no white of the picture in it


@pytest.mark.parametrize("outputs", [["heatmap"], ["overlay"], ["relevance"], ["relevance", "heatmap"]])
def test_outputs(folder, tmp_path, outputs):
    runner.run(explainer(), sources.find([folder / "5.png"]), tmp_path / "out", outputs=outputs)
    wanted = {"heatmap": "5.png.heatmap.png", "overlay": "5.png.overlay.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {results.MANIFEST, results.SET, results.SHARDS,
                                                              results.RESULT, results.SCORES,
                                                              *(wanted[one] for one in outputs if one in wanted)}
    assert ("attribution" in read(tmp_path / "out")) == ("relevance" in outputs)
    assert results.verify(tmp_path / "out").troubles == []
    found = results.open_results(tmp_path / "out")
    assert len(found) == 1
    if "relevance" not in outputs:
        with pytest.raises(OutputError, match="did not keep relevance"):
            found[0]


UNFIT = [
    ({"outputs": ["heat"]}, "'heat' given; required: some of heatmap"), ({"outputs": []}, "none given"),
    ({"batch": 0}, "batch is 0"), ({"workers": True}, "number of threads is True"), ({"shard": -1}, "shard is -1"),
    ({"draw": 1.5}, r"draw is 1\.5"), ({"top": 6}, "top is 6; required: a whole number from 1 to 5"),
    ({"target": "cow"}, "no class is named 'cow'"), ({"target": 5}, "target 5 is not an output"),
    ({"target": [0, -1]}, "target -1 is not an output"), ({"target": 1, "top": 2}, "several were given"),
    ({"top": 2, "true_label": True}, "several were given"),
    ({"storage": results.Storage("float64")}, "is to be stored as 'float64'; required: one of float32, float16, int8"),
    ({"storage": results.Storage(keep=0)}, "of relevance 0 is to be kept; required: a share"),
    ({"storage": results.Storage(keep=float("nan"))}, "of relevance nan is to be kept"),
    ({"storage": results.Storage(compression="zip")}, "compression is 'zip'; required: one of gzip, lzf, or None"),
]


@pytest.mark.parametrize(("options", "message"), UNFIT)
def test_options_that_do_not_fit(folder, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        runner.run(explainer(), sources.find([folder]), tmp_path / "out", **options)


def test_output_folder_among_the_pictures(folder):
    """Twice, for the second time there are drawings in it."""
    for done in (0, 10):
        assert runner.run(explainer(), sources.find([folder]), folder / "out").done_before == done


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_awkward_names(folder, tmp_path):
    long = "\U0001F984" * 58 + ".png"  # with .heatmap.png 248 bytes, of 255 that are possible
    for name in (b"caf\xe9.png", b"two\nlines.png", "größe 大.png".encode(), long.encode()):
        os.rename(folder / "5.png", os.path.join(os.fsencode(folder), name))
        out = tmp_path / name.hex()[:99]
        assert runner.run(explainer(), sources.find([folder]), out).explained == 10
        names = read(out)["file"].tolist()
        shown = {b"caf\xe9.png": "caf\\udce9.png", b"two\nlines.png": "two\\nlines.png"}.get(name) or name.decode()
        assert shown in names
        assert (out / f"{shown}.overlay.png").exists()
        os.rename(os.path.join(os.fsencode(folder), name), folder / "5.png")


def test_bad_pictures(folder, tmp_path):
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "6.png").write_bytes((folder / "6.png").read_bytes()[:200])
    summary = runner.run(explainer(), sources.find([folder]), tmp_path / "out", batch=1)
    assert summary.explained == 8
    assert [path.name for path, _ in summary.failed] == ["3.png", "6.png"]
    assert len(read(tmp_path / "out")["file"]) == 8
    assert [failed[:2] for failed in results.open_results(tmp_path / "out").failed] == [(1, "3.png"), (4, "6.png")]
    (folder / "bad").mkdir()
    (folder / "3.png").rename(folder / "bad" / "3.png")
    summary = runner.run(explainer(), sources.find([folder / "bad"]), tmp_path / "none")
    assert summary.explained == 0
    assert len(summary.failed) == 1
    assert not (tmp_path / "none" / results.RESULT).exists()
    assert len((tmp_path / "none" / results.FAILED).read_text().splitlines()) == 2
    assert results.verify(tmp_path / "none").troubles == []
    assert len(results.open_results(tmp_path / "none")) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("name", [b"n" * 240 + b".png", b"n" * 251 + b".png", b"\xff" * 60 + b".png",
                                  b"below/" + b"\xe9" * 251 + b".png"])
def test_names_that_are_too_long_for_outputs(folder, tmp_path, name):
    """Bytes that are no UTF-8 are written as six letters each."""
    os.rename(folder / "5.png", os.path.join(os.fsencode(folder), name))
    pictures = sources.find([folder])
    for done in (0, 9):
        summary = runner.run(explainer(), pictures, tmp_path / "out")
        assert summary.explained + summary.done_before == 9
        assert summary.done_before == done
        [(path, reason)] = summary.failed
        assert os.fsencode(path) == os.path.join(os.fsencode(folder), name)
        assert "cannot be drawn to" in reason
        assert "File name too long" in reason
        reason.encode()
        assert len(read(tmp_path / "out")["file"]) == 9
        assert left_over(tmp_path / "out") == []
    assert runner.run(explainer(), pictures, tmp_path / "numbers", outputs=["relevance"]).explained == 10


@pytest.mark.parametrize("place", ["5.png.heatmap.png", "5.png.overlay.png", "below"])
def test_what_is_in_the_way_of_a_drawing(folder, tmp_path, place):
    out = tmp_path / "out"
    if place == "below":
        out.mkdir()
        (out / place).write_text("no folder")
    else:
        (out / place / "full").mkdir(parents=True)
    summary = runner.run(explainer(), sources.find([folder]), out, batch=4)
    names = ["below/0.png", "below/1.png"] if place == "below" else ["5.png"]
    assert [path for path, _ in summary.failed] == [folder / name for name in names]
    assert all(f"cannot be drawn to {str(out / place)!r}" in reason for _, reason in summary.failed)
    assert summary.explained == len(read(out)["file"]) == 10 - len(names)
    assert not set(names) & set(read(out)["file"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_pictures_that_are_none(folder, model, tmp_path):
    (folder / "a.png").symlink_to("none")
    (folder / "b.png").symlink_to("b.png")
    os.mkfifo(folder / "c.png")
    (folder / "d.png").symlink_to("below")  # a folder, which is not followed
    (folder / "below" / "e").symlink_to("..")
    run = fastdtd("explain", model, folder, "-o", tmp_path / "out")
    assert run.returncode == 1
    assert "10 explained, 3 failed" in run.stdout
    reasons = run.stderr.splitlines()
    for reason, name, message in zip(reasons, "abc", ["is a link to what does not exist", "symbolic links",
                                                      "named pipe; required: a regular file"], strict=True):
        assert reason.startswith(f"fastdtd: not explained: picture {str(folder / name)!r}"[:-1])
        assert message in reason


def test_a_picture_that_vanishes(folder, tmp_path):
    pictures = sources.find([folder])
    (folder / "5.png").unlink()
    summary = runner.run(explainer(), pictures, tmp_path / "out")
    assert summary.failed == [(folder / "5.png", f"picture {str(folder / '5.png')!r} does not exist")]
    assert summary.explained == 9


def test_a_folder_that_cannot_be_read(folder, tmp_path, monkeypatch):
    """Root may read all: so it is simulated."""
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("below"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for given, count in ((folder, 8), (folder / "below", 0)):
        summary = runner.run(explainer(), sources.find([given]), tmp_path / f"out{count}")
        place = str(folder / "below")
        assert summary.failed == [(folder / "below", f"folder {place!r} cannot be read: Permission denied")]
        assert summary.explained == count


def test_a_picture_beyond_float32(folder, tmp_path):
    """Alone of its batch it is not explained."""
    small = small_model()
    conv, *others = small.graph.layers
    conv = g.Conv2d("conv", ("input", ), np.ones((6, 3, 3, 3)) * 1e38, padding=(1, 1, 1, 1))
    model = Model(g.Graph((conv, *others), (3, 16, 16), (0, 1)), small.preprocessing)
    for i in range(10):
        Image.new("RGB", (16, 16), "white" if i in (3, 5) else "black").save(folder / ("below" if i < 2 else ".")
                                                                            / f"{i}.png")
    summary = runner.run(Explainer(model, threads=2), sources.find([folder]), tmp_path / "out")
    reason = "gives scores or relevance beyond float32; its values or the model's weights are too large"
    assert summary.failed == [(folder / name, f"picture {str(folder / name)!r} {reason}")
                              for name in ("3.png", "5.png")]
    assert summary.explained == len(read(tmp_path / "out")["file"]) == 8


def test_clipping_is_told(folder, tmp_path):
    summary = runner.run(explainer(box=(0.0, 0.5)), sources.find([folder]), tmp_path / "out", batch=3)
    assert "clipped" in summary.clipped


def test_a_model_without_pictures(folder, tmp_path):
    graph = small_model().graph
    with pytest.raises(InputError, match="input is no picture"):
        runner.run(Explainer(Model(graph, Preprocessing(None)), threads=1), sources.find([folder]),
                   tmp_path / "out")


# ---- Runs that are cut off -------------------------------------------------------------------------------------------


def assert_done(out, printed):
    """Every image that was printed has its drawings and its numbers on disk."""
    numbers = set()
    for path in shards(out):
        assert results.read_head(path) is not None
        with h5py.File(path, "r") as file:
            numbers |= set(file["file"].asstr()[...])
            assert np.isfinite(file["attribution"][...]).all()
    for line in printed.splitlines():
        if ".png  " in line:
            name = line.split("  ")[0]
            assert name in numbers
            for kind in ("heatmap", "overlay"):
                with Image.open(out / f"{name}.{kind}.png") as drawn:
                    drawn.load()


@pytest.mark.slow
def test_killed_again_and_again(folder, model, tmp_path):
    """Once the folder is prepared each shard takes 7 changes, and the end 2; after 20, one of up to three that are
    under way is done, whoever was faster."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    calls = [["explain", model, folder, "--batch", "2", "--shard", "3", "--workers", "2", "-o", place]
             for place in (out, whole)]
    assert fastdtd(*calls[1]).returncode == 0
    printed, done = "", set()
    for changes in (0, 1, 4, 20, 3, 6, 1):
        run = fastdtd(changes, *calls[0], code=DYING)
        printed += run.stdout
        assert run.returncode == -signal.SIGKILL or " explained" in run.stdout
        assert_done(out, printed)
        assert {path.name for path in shards(out)} >= done
        done = {path.name for path in shards(out)}
    run = fastdtd(*calls[0])
    assert (run.returncode, run.stderr) == (0, "")
    assert f"{10 - 3 * len(done)} explained, {3 * len(done)} more were done before" in run.stdout
    assert 1 <= len(done) < 4
    assert results.verify(out).troubles == []
    assert_same_files(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_cut_off_from_outside(folder, model, tmp_path, sent):
    rng = np.random.default_rng(2)
    for i in range(90):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((300, 200)).save(folder / f"more{i:03}.png")
    out, whole = tmp_path / "out", tmp_path / "whole"
    # Shells' background jobs are not interruptible.
    interruptible = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    call = [sys.executable, "-c", interruptible + COMMAND, "explain", str(model), str(folder), "--batch", "2",
            "--shard", "2", "-o"]
    seen = set()
    for lines in (1, 9, 4):
        with subprocess.Popen([*call, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            printed = "".join(process.stdout.readline()
                              for _ in range(lines))  # lines come as soon as images are done
            process.send_signal(sent)
            rest, errors = process.communicate(timeout=10)
        assert process.returncode == (130 if sent == signal.SIGINT else -sent)
        assert errors == ("fastdtd: interrupted; what was reported as done is on disk\n"
                          if sent == signal.SIGINT else "")
        assert not (out / results.RESULT).exists()
        printed += rest[:rest.rfind("\n") + 1]
        assert_done(out, printed)
        seen |= {line.split("  ")[0] for line in printed.splitlines()}
    run = subprocess.run([*call, out], capture_output=True, text=True, check=True)
    before = int(run.stdout.split(" explained, ")[1].split(" ")[0])
    assert len(seen) <= before <= len(seen) + 3 * 2 < 100  # a shard may have been written but not yet printed
    subprocess.run([*call, whole], capture_output=True, check=True)
    assert_same_files(out, whole)


def cut_off(entries, out, **options):
    """A run that ends after its first shard of four."""
    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(explainer(**options.pop("model", {})), entries, out, batch=4, shard=4, on_line=stop, **options)
    assert len(shards(out)) == 1


CHANGED = {
    "weights": ({"seed": 1}, {}, 'model sha256 was "[0-9a-f]+'), "box": ({"box": (0.0, 2.0)}, {}, "model sha256 was"),
    "resize": ({"resize": "crop"}, {}, 'preprocessing resize was "stretch" then and is "crop" now'),
    "target": ({}, {"target": "bee"}, r'target was "top 1" then and is \[1\] now'),
    "outputs": ({}, {"outputs": ["relevance"]}, r'outputs was \["heatmap", .* now'),
    "drawings": ({}, {"draw": 3}, "draw was 100 then and is 3 now"),
    "storage": ({}, {"storage": results.Storage("int8")}, 'storage dtype was "float32" then and is "int8" now'),
    "shards": ({}, {"shard": 5}, "shard was 4 then and is 5 now"),
    "draft": ({}, {"draft": True}, "draft was false then and is true now"),
}


@pytest.mark.parametrize(("model", "options", "message"), CHANGED.values(), ids=CHANGED.keys())
def test_only_the_same_call_goes_on(folder, tmp_path, model, options, message):
    entries = sources.find([folder])
    cut_off(entries, tmp_path / "out")
    with pytest.raises(OutputError, match=f"out' holds another run: {message}.*; choose another folder"):
        runner.run(explainer(**model), entries, tmp_path / "out", **{"shard": 4, **options})
    summary = runner.run(explainer(threads=1), entries, tmp_path / "out", shard=4, batch=1, workers=3)
    assert (summary.explained, summary.done_before) == (6, 4)


def test_rules_precision_and_version_are_part_of_a_run(folder, tmp_path, monkeypatch):
    entries = sources.find([folder])
    cut_off(entries, tmp_path)
    with pytest.raises(OutputError, match='rules conv was "zB" then and is "flat" now'):
        runner.run(Explainer(small_model(), {"conv": "flat"}, threads=1), entries, tmp_path, shard=4)
    for_gpu = explainer()
    for_gpu.precision = "tf32"
    with pytest.raises(OutputError, match='precision was "" then and is "tf32" now'):
        runner.run(for_gpu, entries, tmp_path, shard=4)
    monkeypatch.setattr("fastdtd.__version__", "9.0")
    with pytest.raises(OutputError, match=r'fastdtd was ".*" then and is "9.0" now'):
        runner.run(explainer(), entries, tmp_path, shard=4)


def test_a_source_that_changes(folder, tmp_path):
    cut_off(sources.find([folder]), tmp_path / "out")
    (folder / "5.png").rename(folder / "new.png")
    (folder / "more.png").write_bytes((folder / "new.png").read_bytes())
    for gone, message in ((None, r"images count was 10 then and is 11 now \(the first that differs is image 3: it was "
                                 r"'5.png', and is '6.png'\)"),
                          ("more.png", r"images sha256 was .*image 3: it was '5.png', and is '6.png'")):
        if gone:
            (folder / gone).unlink()
        with pytest.raises(OutputError, match=message):
            runner.run(explainer(), sources.find([folder]), tmp_path / "out", shard=4)
    (folder / "new.png").rename(folder / "5.png")
    (folder / "9.png").unlink()  # it vanishes after it was found
    entries = sources.find([folder])
    (folder / "9.png").write_bytes((folder / "5.png").read_bytes())
    summary = runner.run(explainer(), sources.find([folder]), tmp_path / "out", shard=4)
    assert (summary.explained, summary.done_before) == (6, 4)
    assert len(entries) == 9


def test_the_same_bytes_however_it_was_cut_up(folder, tmp_path):
    """Images that cannot be read among them."""
    for name in ("3.png", "4.png", "8.png"):
        (folder / name).write_bytes(b"no picture")
    entries = sources.find([folder])
    cut_off(entries, tmp_path / "out")
    summary = runner.run(explainer(), entries, tmp_path / "out", batch=3, shard=4)
    assert [os.path.basename(path) for path, _ in summary.failed] == ["3.png", "4.png", "8.png"]
    runner.run(explainer(), entries, tmp_path / "whole", batch=4, shard=4)
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def test_images_that_failed_are_tried_again_where_that_is_asked_for(folder, tmp_path):
    whole = (folder / "3.png").read_bytes()
    for name in ("3.png", "below/1.png"):
        (folder / name).write_bytes(b"no picture")
    entries = sources.find([folder])
    counts = []
    for retry in (False, False, True, True):
        summary = runner.run(explainer(), entries, tmp_path / "out", shard=3, retry_failed=retry)
        counts.append((summary.explained, summary.done_before, len(summary.failed)))
        (folder / "3.png").write_bytes(whole)
    assert counts == [(8, 0, 2), (0, 8, 2), (3, 6, 1), (0, 9, 1)]
    assert len(read(tmp_path / "out")["file"]) == 9
    assert results.verify(tmp_path / "out").troubles == []


@pytest.mark.parametrize("how", ["gone", "cut", "no head", "empty"])
def test_shards_that_are_not_whole_are_made_again(folder, tmp_path, how):
    entries = sources.find([folder])
    for place in ("out", "whole"):
        runner.run(explainer(), entries, tmp_path / place, shard=3)
    path = shards(tmp_path / "out")[2]
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-1], "no head": content[:20] + b"x" + content[21:], "empty": b""}[how])
    with pytest.raises(OutputError, match=r"has 3 of 4 shards whole, and 00002\.h5 is missing or damaged"):
        results.open_results(tmp_path / "out")
    found = results.verify(tmp_path / "out")
    assert found.troubles == ["00002.h5 is missing, cut off, or no shard"]
    summary = runner.run(explainer(), entries, tmp_path / "out", shard=3)
    assert (summary.explained, summary.done_before) == (3, 7)
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def test_drawings_alone_go_on_too(folder, tmp_path):
    entries = sources.find([folder])
    cut_off(entries, tmp_path, outputs=["heatmap"])
    summary = runner.run(explainer(), entries, tmp_path, outputs=["heatmap"], shard=4)
    assert (summary.explained, summary.done_before) == (6, 4)
    assert len(list(tmp_path.rglob("*.heatmap.png"))) == 10
    assert left_over(tmp_path) == []


# ---- Several runs ----------------------------------------------------------------------------------------------------


def test_a_folder_is_one_runs_at_a_time(folder, tmp_path):
    out = tmp_path / "out"
    entries = sources.find([folder])
    refused = []

    def start_another(line):
        with pytest.raises(OutputError, match=rf"another run is writing to '.*out': process {os.getpid()} on"):
            runner.run(explainer(), entries, out, target="bee")
        refused.append(line.name)

    assert runner.run(explainer(), entries, out, shard=4, on_line=start_another).explained == 10
    assert len(refused) == 10
    runner.run(explainer(), entries, tmp_path / "whole", shard=4)
    assert_same_files(out, tmp_path / "whole")


@pytest.mark.parametrize("made_again", [False, True])
def test_an_output_folder_that_is_removed_or_replaced(folder, tmp_path, made_again):
    out, moved = tmp_path / "out", tmp_path / "moved"

    def move(line):
        if not moved.exists():
            out.rename(moved)
            if made_again:
                out.mkdir()

    entries = sources.find([folder])
    with pytest.raises(OutputError, match=r"removed or replaced|cannot write to"):
        runner.run(explainer(), entries, out, shard=4, draw=0, on_line=move)
    assert not out.exists() or left_over(out) == shards(out) == []
    assert len(shards(moved)) == 1
    assert runner.run(explainer(), entries, moved, shard=4, draw=0).done_before == 4


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_trouble_of_all_stops_the_run(folder, tmp_path, monkeypatch, number):
    entries, out = sources.find([folder]), tmp_path / "out"

    def replace(path, write):
        if path.name.startswith("6.png"):
            raise OSError(number, os.strerror(number), str(path))
        files.replace(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(shard_maker, "replace", replace)
        with pytest.raises(OutputError, match=os.strerror(number)):
            runner.run(explainer(), entries, out, shard=3)
    assert runner.run(explainer(), entries, out, shard=3).done_before == 3


def test_a_folder_that_refuses_all_files_stops_the_run(folder, tmp_path, monkeypatch):
    """Not one image after the other."""
    entries, out = sources.find([folder]), tmp_path / "out"
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "here")

    def refuse(*_, **__):
        raise refused

    with monkeypatch.context() as patch:
        def close(line):
            patch.setattr(shard_maker, "replace", refuse)
            patch.setattr(shard_maker.tempfile, "TemporaryFile", refuse)

        with pytest.raises(OutputError, match="Permission denied"):
            runner.run(explainer(), entries, out, shard=3, batch=1, workers=1, on_line=close)
    assert runner.run(explainer(), entries, out, shard=3).done_before >= 3


def test_stray_files(folder, tmp_path):
    """Those of a killed run go, others of a similar name stay."""
    stray = [f"{place}.{name}.{'0123456789abcdef' * 2}" for place, name in (
        ("", "5.png.heatmap.png"), ("below/", "1.png.overlay.png"), ("", "attribution.h5"), ("", "manifest.json"),
        ("shards/", "00003.h5"))]
    mine = [".bashrc", ".notes.0123456789abcdef0123456789abcdef", "attribution.old.h5", ".5.png.heatmap.png"]
    entries, out = sources.find([folder]), tmp_path / "out"
    runner.run(explainer(), entries, out)
    for name in stray + mine:
        (out / name).write_bytes(b"half of it")
    assert runner.run(explainer(), entries, out).done_before == 10
    assert not any((out / name).exists() for name in stray)
    assert all((out / name).exists() for name in mine)


@pytest.mark.slow
def test_more_shards_than_files_can_be_open(folder, tmp_path):
    """HDF5 would answer for those that it cannot open with what it fills in."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = os.open(os.devnull, os.O_RDONLY)  # the first that is free
    os.close(used)
    for i in range(40):
        (folder / f"more{i}.png").write_bytes((folder / "5.png").read_bytes())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, limits[1]))
    try:
        runner.run(explainer(), sources.find([folder]), tmp_path, shard=1, draw=0)
        relevance = results.open_results(tmp_path)[:]
        assert results.verify(tmp_path).troubles == []
        with h5py.File(tmp_path / results.RESULT) as file:
            missing = np.isnan(file["attribution"][...]).any((1, 2, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert np.isfinite(relevance).all()
    assert missing.any()
    with h5py.File(tmp_path / results.RESULT) as file:
        np.testing.assert_array_equal(file["attribution"][...], relevance)


def test_never_five_hundred_shards(folder, tmp_path):
    entry = sources.find([folder / "5.png"])[0]
    entries = [dataclasses.replace(entry, name=f"{i}") for i in range(1100)]
    runner.run(explainer(), entries, tmp_path, shard=1, draw=0)
    assert len(shards(tmp_path)) == 367
    assert len(results.open_results(tmp_path)) == 1100
    assert json.loads((tmp_path / results.MANIFEST).read_text())["shard"] == 3


# ---- Finished runs ---------------------------------------------------------------------------------------------------


def change(path, name, spoil):
    """A column of a shard, with a head that says it is whole."""
    with h5py.File(path, "r+") as file:
        values = file[name][...]
        spoil(values)
        file[name][...] = values
    head = results.read_head(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(head.sha256.encode(), results._digest(path).encode()))


SPOILED = {
    "bytes": (None, None, "00001.h5 has another checksum than it says: it is damaged"),
    "a number": ("attribution", lambda a: a.__setitem__((1, 0, 3, 3), 5e3), "00001.h5 row 1 has relevance that sums"),
    "not finite": (
        "attribution", lambda a: a.__setitem__((0, 0, 0, 0), np.nan), "00001.h5 row 0 has relevance that sums"),
    "sums": ("absorbed", lambda a: a.__setitem__(2, -1e3), "00001.h5 row 2 loses"),
    "images": ("image", lambda a: a.__setitem__(2, 0), "00001.h5 holds 3 images and 0 failed ones; required: the 3 of"),
}


@pytest.mark.parametrize(("name", "spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_what_is_wrong_with_a_finished_run(folder, tmp_path, name, spoil, message):
    runner.run(explainer(), sources.find([folder]), tmp_path, shard=3)
    path = shards(tmp_path)[1]
    if name:
        change(path, name, spoil)
    else:
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    [trouble] = results.verify(tmp_path).troubles
    assert trouble.startswith(message)
    run = fastdtd("verify", tmp_path)
    assert run.returncode == 1
    assert trouble in run.stdout
    assert "4 shards" in run.stdout


def test_what_is_no_run(folder, tmp_path):
    for text, message in ((None, "has no manifest.json; required: the output folder of a run"), ("{}", "another JSON"),
                          ("[" * 10**5, "is no manifest"), ('{"format": "fastdtd-run", "version": 2}', "of version 2"),
                          ('{"format": "fastdtd-run", "version": 1, "shards": 1e9}', "says 1000000000.0 shards")):
        if text:
            (tmp_path / results.MANIFEST).write_text(text)
        for read_it in (results.open_results, results.verify):
            with pytest.raises(OutputError, match=message):
                read_it(tmp_path)


def test_results_as_a_sequence(folder, tmp_path):
    runner.run(explainer(), sources.find([folder]), tmp_path, shard=3)
    found = results.open_results(str(tmp_path))
    assert len(found) == 10
    assert repr(found).startswith("<Results of 10 explanations in ")
    np.testing.assert_array_equal(found[-1], found[9])
    np.testing.assert_array_equal(found[2:9:3], np.stack([found[2], found[5], found[8]]))
    assert found[5:5].shape == (0, 3, 16, 16)
    for row in (10, -11, "1", 1.0):
        with pytest.raises(IndexError):
            found[row]


# ---- Disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [
    "file", "file/below",
    pytest.param("/proc/nowhere", marks=pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")),
])
def test_places_that_cannot_be_written(folder, tmp_path, out):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write to .*; required: a folder"):
        runner.run(explainer(), sources.find([folder]), tmp_path / out)


@pytest.mark.parametrize("full_at", ["2.png.overlay.png", "00001.h5", "attribution.h5", "scores.csv"])
def test_full_disk(folder, tmp_path, monkeypatch, full_at):
    entries, out, whole = sources.find([folder]), tmp_path / "out", tmp_path / "whole"
    runner.run(explainer(), entries, whole, shard=4)
    printed = []

    @contextlib.contextmanager
    def replacing(path):
        with files.replacing(path) as beside:
            yield beside
            if path.name == full_at:
                os.truncate(beside, beside.stat().st_size // 2)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def replace(path, write):
        with replacing(path) as beside:
            write(beside)

    with monkeypatch.context() as patch:
        for module in (shard_maker, results):
            patch.setattr(module, "replace", replace)
        patch.setattr(shard_maker, "replacing", replacing)
        with pytest.raises(OutputError, match="No space left on device"):
            runner.run(explainer(), entries, out, shard=4, on_line=lambda line: printed.append(f"{line.name}  done"))
    assert len(printed) == {"attribution.h5": 10, "scores.csv": 10, "00001.h5": 4}.get(full_at, 0)
    assert_done(out, "\n".join(printed))
    assert not any(name.startswith(".") for name in left_over(out))
    assert runner.run(explainer(), entries, out, shard=4).done_before == len(printed)
    assert_same_files(out, whole)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be taken beforehand")
def test_no_room_for_a_shard(folder, model, tmp_path):
    """HDF5 itself would bring the process down."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)); {COMMAND}"
    call = ["explain", model, folder, "-o", tmp_path / "out"]
    run = fastdtd(*call, code=limited)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("fastdtd: cannot write to")
    assert "File too large" in run.stderr
    assert fastdtd(*call).stdout.splitlines()[-1].startswith("10 explained")
    assert shards(tmp_path / "out")[0].stat().st_size < 600_000  # what was taken too much is given back
