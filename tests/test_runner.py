"""Runs over many pictures: all results right and whole, whatever the pictures, the disk, or the moment a run is killed.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from fastdtd import files, heatmap, images, runner
from fastdtd import graph as g
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
    with h5py.File(out / runner.RESULT, "r") as file:
        return {
            name: values.asstr()[...] if h5py.check_string_dtype(values.dtype) else values[...]
            for name, values in file.items()
        }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, name)


def left_over(out):
    return [p.name for p in out.rglob("*") if p.is_file() and p.name != runner.RESULT and not p.name.endswith(".png")]


def fastdtd(*arguments, code=COMMAND, **options):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          check=False, timeout=100, **options)


def test_results(folder, tmp_path):
    out = tmp_path / "new" / "out"
    made, lines, steps = explainer(), [], []
    pictures = runner.find_pictures([folder])
    summary = runner.run(made, pictures, out, batch=4, on_line=lines.append, on_progress=steps.append)
    assert (summary.explained, summary.done_before, summary.failed, summary.clipped) == (10, 0, [], None)
    assert sum(steps) == 10
    names = ["2.png", "3.png", "4.png", "5.png", "6.png", "7.png", "8.png", "9.png", "below/0.png", "below/1.png"]
    found = read(out)
    assert found["file"].tolist() == [line.name for line in lines] == names
    e = made(np.stack([made.model.preprocess(folder / name) for name in names]))
    for name, values in {
            "relevance": e.relevance, "scores": e.output, "target": e.target, "explained": e.explained,
            "absorbed": e.absorbed, "sum": e.relevance.sum((1, 2, 3), dtype=float), "classes": made.model.classes
    }.items():
        np.testing.assert_array_equal(found[name], values)
    assert json.loads(found["rules"][()]) == {"conv": "zB", "pool": "winner", "scores": "z+"}
    assert "source" not in found
    for line, score, absorbed in zip(lines, e.output.max(1), e.absorbed, strict=True):
        assert line.class_name == made.model.classes[line.target]
        assert line.score == score
        assert line.relevance + line.absorbed == pytest.approx(score, rel=1e-4)
        assert line.absorbed == absorbed
    for i, name in enumerate(names):
        with Image.open(out / f"{name}.heatmap.png") as drawn:
            np.testing.assert_array_equal(drawn, heatmap.draw(e.relevance[i]))
        with Image.open(out / f"{name}.overlay.png") as drawn:
            np.testing.assert_array_equal(drawn, heatmap.draw(e.relevance[i], images.open_picture(folder / name)))
    assert left_over(out) == []


def test_pictures_at_a_time(folder, tmp_path):
    """Unless it is said: on GPUs as many as they take at once, if that is more."""
    for precision, each, wanted in (("", 7, [10]), ("fp32", 3, [10]), ("fp32", 9, [10]), ("tf32", 9, [18, 2])):
        made, steps = explainer(), []
        made.precision, made._executor.batch = precision, each
        pictures = runner.find_pictures([folder]) * (2 if precision == "tf32" else 1)
        runner.run(made, [runner.Picture(p.path, f"{i}") for i, p in enumerate(pictures)],
                   tmp_path / f"{each}{precision}", on_progress=steps.append, outputs=["heatmap"])
        assert made.at_once == 2 * each
        assert steps == [0, *wanted]


def test_overlay_shows_what_the_network_saw(tmp_path):
    photo = Image.new("RGB", (3000, 1000), "white")  # the network's part is the middle third, turned upright
    photo.paste("black", (1000, 0, 2000, 1000))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.png", exif=exif)
    runner.run(explainer(resize="crop"), runner.find_pictures([tmp_path / "a.png"]), tmp_path / "out", target=0)
    with Image.open(tmp_path / "out" / "a.png.overlay.png") as drawn:
        assert drawn.height == 1000
        assert np.percentile(np.asarray(drawn)[:, :1000, 2], 95) < 200  # no white of the picture in it


@pytest.mark.parametrize("outputs", [["heatmap"], ["overlay"], ["relevance"], ["relevance", "heatmap"]])
def test_outputs(folder, tmp_path, outputs):
    runner.run(explainer(), runner.find_pictures([folder / "5.png"]), tmp_path / "out", outputs=outputs)
    wanted = {"heatmap": "5.png.heatmap.png", "overlay": "5.png.overlay.png", "relevance": runner.RESULT}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {wanted[one] for one in outputs}


def test_options_that_do_not_fit(folder, tmp_path):
    pictures = runner.find_pictures([folder])
    for options, message in (({"outputs": ["heat"]}, "'heat' given; required: some of heatmap"),
                             ({"outputs": []}, "none given"), ({"batch": 0}, "batch is 0"), ({"target": "cow"},
                                                                                             "no class is named 'cow'"),
                             ({"target": 5}, "target 5 is not an output"), ({"target": -1},
                                                                            "target -1 is not an output")):
        with pytest.raises(InputError, match=message):
            runner.run(explainer(), pictures, tmp_path / "out", **options)


def test_finding_pictures(folder, tmp_path):
    (folder / "notes.txt").write_text("no picture")
    (folder / "._5.png").write_text("not for people")
    (folder / ".thumbnails").mkdir()
    (folder / "5.png").rename(folder / "5.PNG")
    for name in (".thumbnails/5.png", "7.png.heatmap.png", "7.png.overlay.png"):
        (folder / name).write_bytes((folder / "7.png").read_bytes())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "7.png").write_bytes((folder / "7.png").read_bytes())
    found = runner.find_pictures([folder / "7.png", tmp_path / "other" / "7.png", folder, folder / "." / "8.png"])
    assert [p.name for p in found] == [
        "7.png", "7.png-2", "2.png", "3.png", "4.png", "5.PNG", "6.png", "8.png", "9.png", "below/0.png", "below/1.png"
    ]
    for sources, message in (([tmp_path / "none"], "does not exist"), (["x" * 5000], "does not exist"),
                             ([tmp_path / "empty"], "no picture was found")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            runner.find_pictures(sources)


def test_output_folder_among_the_pictures(folder):
    """Twice, for the second time there are drawings in it."""
    for _ in range(2):
        assert runner.run(explainer(), runner.find_pictures([folder]), folder / "out").explained == 10


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_awkward_names(folder, tmp_path):
    long = "\U0001F984" * 58 + ".png"  # with .heatmap.png 248 bytes, of 255 that are possible
    for name in (b"caf\xe9.png", b"two\nlines.png", "größe 大.png".encode(), long.encode()):
        os.rename(folder / "5.png", os.path.join(os.fsencode(folder), name))
        assert runner.run(explainer(), runner.find_pictures([folder]), tmp_path / "out").explained == 10
        names = read(tmp_path / "out")["file"].tolist()
        shown = {b"caf\xe9.png": "caf\\udce9.png", b"two\nlines.png": "two\\nlines.png"}.get(name) or name.decode()
        assert shown in names
        assert (tmp_path / "out" / f"{shown}.overlay.png").exists()
        os.rename(os.path.join(os.fsencode(folder), name), folder / "5.png")


def test_bad_pictures(folder, tmp_path):
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "6.png").write_bytes((folder / "6.png").read_bytes()[:200])
    summary = runner.run(explainer(), runner.find_pictures([folder]), tmp_path / "out", batch=1)
    assert summary.explained == 8
    assert [path.name for path, _ in summary.failed] == ["3.png", "6.png"]
    assert len(read(tmp_path / "out")["file"]) == 8
    (folder / "bad").mkdir()
    (folder / "3.png").rename(folder / "bad" / "3.png")
    summary = runner.run(explainer(), runner.find_pictures([folder / "bad"]), tmp_path / "none")
    assert summary.explained == 0
    assert len(summary.failed) == 1
    assert list((tmp_path / "none").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("name", [b"n" * 240 + b".png", b"n" * 251 + b".png", b"\xff" * 60 + b".png",
                                  b"below/" + b"\xe9" * 251 + b".png"])
def test_names_that_are_too_long_for_outputs(folder, tmp_path, name):
    """Bytes that are no UTF-8 are written as six letters each."""
    os.rename(folder / "5.png", os.path.join(os.fsencode(folder), name))
    pictures = runner.find_pictures([folder])
    for _ in range(2):
        summary = runner.run(explainer(), pictures, tmp_path / "out")
        assert summary.explained == 9
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
    summary = runner.run(explainer(), runner.find_pictures([folder]), out, batch=4)
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
    pictures = runner.find_pictures([folder])
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
    for sources, count in (([folder], 8), ([folder / "below"], 0)):
        summary = runner.run(explainer(), runner.find_pictures(sources), tmp_path / "out")
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
    summary = runner.run(Explainer(model, threads=2), runner.find_pictures([folder]), tmp_path / "out")
    reason = "gives scores or relevance beyond float32; its values or the model's weights are too large"
    assert summary.failed == [(folder / name, f"picture {str(folder / name)!r} {reason}")
                              for name in ("3.png", "5.png")]
    assert summary.explained == len(read(tmp_path / "out")["file"]) == 8


def test_clipping_is_told(folder, tmp_path):
    summary = runner.run(explainer(box=(0.0, 0.5)), runner.find_pictures([folder]), tmp_path / "out", batch=3)
    assert "clipped" in summary.clipped


def test_a_model_without_pictures(folder, tmp_path):
    graph = small_model().graph
    with pytest.raises(InputError, match="input is no picture"):
        runner.run(Explainer(Model(graph, Preprocessing(None)), threads=1), runner.find_pictures([folder]),
                   tmp_path / "out")


# ---- Runs that are cut off -------------------------------------------------------------------------------------------


def assert_done(out, printed):
    """Every picture that was printed has its drawings and its numbers on disk."""
    numbers = set()
    for path in [*out.glob("explanations.part-*.h5"), *out.glob(runner.RESULT)]:
        with h5py.File(path, "r") as file:
            numbers |= set(file["file"].asstr()[...])
            assert np.isfinite(file["relevance"][...]).all()
    for line in printed.splitlines():
        if ".png  " in line:
            name = line.split("  ")[0]
            assert name in numbers
            for kind in ("heatmap", "overlay"):
                with Image.open(out / f"{name}.{kind}.png") as drawn:
                    drawn.load()


@pytest.mark.slow
def test_killed_again_and_again(folder, model, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    calls = [["explain", model, folder, "--batch", "3", "--threads", "2", "-o", place] for place in (out, whole)]
    assert fastdtd(*calls[1]).returncode == 0
    printed = ""
    for changes in (0, 4, 11, 8, 6, 1):  # a batch takes 7 changes
        run = fastdtd(changes, *calls[0], code=DYING)
        assert run.returncode == -signal.SIGKILL
        printed += run.stdout
        assert_done(out, printed)
        assert not (out / runner.RESULT).exists()
    done = printed.count(".png  ")
    assert done in (3, 6)  # removing what the run before left are changes too, of which there are more or less
    run = fastdtd(*calls[0])
    assert (run.returncode, run.stderr) == (0, "")
    assert f"{10 - done} explained, {done} more were done before" in run.stdout
    assert sorted(line.split("  ")[0] for line in (printed + run.stdout).splitlines()
                  if ".png  " in line) == sorted(read(whole)["file"])
    assert_same(read(out), read(whole))
    assert left_over(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("changes", [24, 25, 26, 28])
def test_killed_at_the_end(folder, model, tmp_path, changes):
    """Before the result is there, before the parts are gone, and between them."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    call = ["explain", model, folder, "--batch", "3", "--threads", "2", "-o"]
    run = fastdtd(changes, *call, out, code=DYING)
    assert run.returncode == -signal.SIGKILL
    assert run.stdout.count(".png  ") == 10
    assert (out / runner.RESULT).exists() == (changes > 24)
    assert_done(out, run.stdout)
    assert fastdtd(*call, out).returncode == fastdtd(*call, whole).returncode == 0
    assert_same(read(out), read(whole))
    assert left_over(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_cut_off_from_outside(folder, model, tmp_path, sent):
    rng = np.random.default_rng(2)
    for i in range(50):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((300, 200)).save(folder / f"more{i:03}.png")
    out, whole = tmp_path / "out", tmp_path / "whole"
    # Shells' background jobs are not interruptible.
    interruptible = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    call = [sys.executable, "-c", interruptible + COMMAND, "explain", str(model), str(folder), "--batch", "2", "-o"]
    seen = 0
    for lines in (1, 9, 4):
        with subprocess.Popen([*call, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            printed = "".join(process.stdout.readline()
                              for _ in range(lines))  # lines come as soon as pictures are done
            process.send_signal(sent)
            rest, errors = process.communicate(timeout=10)
        assert process.returncode == (130 if sent == signal.SIGINT else -sent)
        assert errors == ("fastdtd: interrupted; what was reported as done is on disk\n"
                          if sent == signal.SIGINT else "")
        assert not (out / runner.RESULT).exists()
        printed += rest[:rest.rfind("\n") + 1]
        assert_done(out, printed)
        seen += printed.count("\n")
    run = subprocess.run([*call, out], capture_output=True, text=True, check=True)
    before = int(run.stdout.split(" explained, ")[1].split(" ")[0])
    assert seen <= before <= seen + 3 * 2 < 60  # a batch may have been written but not yet printed
    subprocess.run([*call, whole], capture_output=True, check=True)
    assert_same(read(out), read(whole))
    assert left_over(out) == []


def cut_off(pictures, out, **options):
    """A run that ends after its first batch of four."""
    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(explainer(**options.pop("model", {})), pictures, out, batch=4, on_line=stop, **options)
    assert len(list(out.glob("explanations.part-*.h5"))) == 1


def test_only_the_same_call_goes_on(folder, tmp_path):
    out = tmp_path / "out"
    pictures = runner.find_pictures([folder])
    cut_off(pictures, out)
    for model, options in [({"seed": 1}, {}), ({"box": (0.0, 2.0)}, {}), ({"resize": "crop"}, {}),
                           ({}, {"target": "bee"}), ({}, {"outputs": ["overlay"]})]:
        with pytest.raises(OutputError, match="left of a run that was cut off"):
            runner.run(explainer(**model), pictures, out, **options)
    with pytest.raises(OutputError, match="left of a run that was cut off"):
        runner.run(Explainer(small_model(), {"conv": "flat"}, threads=1), pictures, out)
    for_gpu = explainer()
    for_gpu.precision = "tf32"
    with pytest.raises(OutputError, match=r"left of a run that was cut off, with .* precision"):
        runner.run(for_gpu, pictures, out)
    (tmp_path / "moved").mkdir()
    (folder / "2.png").rename(tmp_path / "moved" / "2.png")  # another picture of the same name
    with pytest.raises(OutputError, match="left of a run that was cut off"):
        runner.run(explainer(), runner.find_pictures([folder, tmp_path / "moved"]), out)
    (tmp_path / "moved" / "2.png").rename(folder / "2.png")
    (folder / "5.png").rename(folder / "new.png")  # one done is gone
    with pytest.raises(OutputError, match="left of a run that was cut off"):
        runner.run(explainer(), runner.find_pictures([folder]), out)
    (folder / "new.png").rename(folder / "5.png")
    (folder / "more.png").write_bytes(
        (folder / "5.png").read_bytes())  # more pictures are no matter, nor how many go at a time
    summary = runner.run(explainer(threads=1), runner.find_pictures([folder]), out, batch=2)
    assert (summary.explained, summary.done_before) == (7, 4)
    assert len(read(out)["file"]) == 11


@pytest.mark.parametrize("changed", ["nothing", "mended", "more"])
def test_the_same_bytes_however_it_was_cut_up(folder, tmp_path, changed):
    """Pictures that cannot be read, then or later, put others into other batches."""
    whole = (folder / "3.png").read_bytes()
    for name in ("3.png", "4.png", "8.png"):
        (folder / name).write_bytes(b"no picture")
    cut_off(runner.find_pictures([folder]), tmp_path / "out")
    if changed == "mended":
        (folder / "3.png").write_bytes(whole)
    elif changed == "more":
        (folder / "0.png").write_bytes(whole)
    pictures = runner.find_pictures([folder])
    summary = runner.run(explainer(), pictures, tmp_path / "out", batch=3)
    assert len(summary.failed) == (2 if changed == "mended" else 3)
    runner.run(explainer(), pictures, tmp_path / "whole", batch=4)
    names = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*"))
    assert names == sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*"))
    for name in names:
        if (tmp_path / "out" / name).is_file():
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read(tmp_path / "out")["file"].tolist() == sorted(read(tmp_path / "out")["file"])


# ---- Several runs ----------------------------------------------------------------------------------------------------


def test_a_folder_is_one_runs_at_a_time(folder, tmp_path):
    out = tmp_path / "out"
    pictures = runner.find_pictures([folder])
    refused = []

    def start_another(line):
        with pytest.raises(OutputError, match=rf"another run is writing to '.*out': process {os.getpid()} on"):
            runner.run(explainer(), pictures, out, target="bee")
        refused.append(line.name)

    assert runner.run(explainer(), pictures, out, batch=4, on_line=start_another).explained == 10
    assert len(refused) == 10
    runner.run(explainer(), pictures, tmp_path / "whole", batch=4)
    assert (out / runner.RESULT).read_bytes() == (tmp_path / "whole" / runner.RESULT).read_bytes()
    assert left_over(out) == []


@pytest.mark.parametrize("how", ["another run's", "a copy", "damaged", "gone"])
def test_parts_are_checked_before_they_are_joined(folder, tmp_path, how):
    out, other = tmp_path / "out", tmp_path / "other"
    pictures = runner.find_pictures([folder])
    cut_off(pictures, other, target="bee")

    def disturb(line):
        part, second = out / "explanations.part-000000.h5", out / "explanations.part-000001.h5"
        if second.exists() and not disturbed:
            disturbed.append(True)
            match how:
                case "another run's":
                    part.write_bytes((other / part.name).read_bytes())
                case "a copy":
                    part.write_bytes(second.read_bytes())
                case "damaged":
                    part.write_bytes(part.read_bytes()[:2000])
                case "gone":
                    part.unlink()

    disturbed = []
    with pytest.raises(OutputError, match=r"part-000000.*(another model|was removed)|not of one run"):
        runner.run(explainer(), pictures, out, batch=4, on_line=disturb)
    assert not (out / runner.RESULT).exists()
    assert len(list(out.glob("explanations.part-*.h5"))) == (2 if how == "gone" else 3)


@pytest.mark.parametrize("made_again", [False, True])
def test_an_output_folder_that_is_removed_or_replaced(folder, tmp_path, made_again):
    out, moved = tmp_path / "out", tmp_path / "moved"

    def move(line):
        if not moved.exists():
            out.rename(moved)
            if made_again:
                out.mkdir()

    pictures = runner.find_pictures([folder])
    with pytest.raises(OutputError, match=r"removed or replaced|cannot write to"):
        runner.run(explainer(), pictures, out, batch=4, on_line=move)
    if made_again:
        assert left_over(out) == []
        assert not (out / runner.RESULT).exists()
    else:
        assert not out.exists()
    assert_done(moved, "2.png  \n3.png  \n4.png  \n5.png  \n")
    assert runner.run(explainer(), pictures, moved, batch=4).done_before == 4


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_trouble_of_all_stops_the_run(folder, tmp_path, monkeypatch, number):
    pictures, out = runner.find_pictures([folder]), tmp_path / "out"

    def replace(path, write):
        if path.name.startswith("6.png"):
            raise OSError(number, os.strerror(number), str(path))
        files.replace(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "replace", replace)
        with pytest.raises(OutputError, match=os.strerror(number)):
            runner.run(explainer(), pictures, out, batch=3)
    assert runner.run(explainer(), pictures, out, batch=3).done_before == 3


def test_a_folder_that_refuses_all_files_stops_the_run(folder, tmp_path, monkeypatch):
    """Not one picture after the other."""
    pictures, out = runner.find_pictures([folder]), tmp_path / "out"
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "here")

    def refuse(*_, **__):
        raise refused

    with monkeypatch.context() as patch:
        def close(line):
            patch.setattr(runner, "replace", refuse)
            patch.setattr(runner.tempfile, "TemporaryFile", refuse)

        with pytest.raises(OutputError, match="Permission denied"):
            runner.run(explainer(), pictures, out, batch=3, on_line=close)
    assert runner.run(explainer(), pictures, out, batch=3).done_before == 3


def test_drawings_alone_go_on_too(folder, tmp_path):
    out = tmp_path / "out"
    pictures = runner.find_pictures([folder])
    cut_off(pictures, out, outputs=["heatmap"])
    summary = runner.run(explainer(), pictures, out, outputs=["heatmap"])
    assert (summary.explained, summary.done_before) == (6, 4)
    assert len(list(out.rglob("*.heatmap.png"))) == 10
    assert left_over(out) == []
    assert not (out / runner.RESULT).exists()


def test_damaged_parts_are_not_joined(folder, tmp_path):
    pictures = runner.find_pictures([folder])
    cut_off(pictures, tmp_path)
    part = next(tmp_path.glob("explanations.part-*.h5"))
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(OutputError, match=part.name):
        runner.run(explainer(), pictures, tmp_path)


@pytest.mark.slow
def test_more_parts_than_files_can_be_open(folder, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = os.open(os.devnull, os.O_RDONLY)  # the first that is free
    os.close(used)
    for i in range(40):
        (folder / f"more{i}.png").write_bytes((folder / "5.png").read_bytes())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, limits[1]))
    try:
        assert runner.run(explainer(), runner.find_pictures([folder]), tmp_path / "out", batch=1).explained == 50
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(read(tmp_path / "out")["file"]) == 50


def test_stray_files(folder, tmp_path):
    """Those of a killed run go, others of a similar name stay."""
    stray = [
        f".{name}.{'0123456789abcdef' * 2}"
        for name in ("5.png.heatmap.png", "below/1.png.overlay.png", "explanations.h5", "explanations.part-000003.h5")
    ]
    stray[1] = "below/." + stray[1].removeprefix(".below/")
    mine = [".bashrc", ".notes.0123456789abcdef0123456789abcdef", "explanations.part-x.h5", ".5.png.heatmap.png"]
    (tmp_path / "out" / "below").mkdir(parents=True)
    for name in stray + mine:
        (tmp_path / "out" / name).write_bytes(b"half of it")
    assert runner.run(explainer(), runner.find_pictures([folder]), tmp_path / "out").explained == 10
    assert not any((tmp_path / "out" / name).exists() for name in stray)
    assert all((tmp_path / "out" / name).exists() for name in mine)
    assert len(read(tmp_path / "out")["file"]) == 10


# ---- Disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [
    "file", "file/below",
    pytest.param("/proc/nowhere", marks=pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")),
])
def test_places_that_cannot_be_written(folder, tmp_path, out):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write to .*; required: a folder"):
        runner.run(explainer(), runner.find_pictures([folder]), tmp_path / out)


@pytest.mark.parametrize("full_at", ["2.png.overlay.png", "explanations.part-000001.h5", "explanations.h5"])
def test_full_disk(folder, tmp_path, monkeypatch, full_at):
    pictures, out, whole = runner.find_pictures([folder]), tmp_path / "out", tmp_path / "whole"
    runner.run(explainer(), pictures, whole, batch=4)
    printed = []

    def replace(path, write):
        def write_half(beside):
            write(beside)
            os.truncate(beside, beside.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        files.replace(path, write_half if path.name == full_at else write)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "replace", replace)
        with pytest.raises(OutputError, match="No space left on device"):
            runner.run(explainer(), pictures, out, batch=4, on_line=lambda line: printed.append(f"{line.name}  done"))
    assert len(printed) == {"explanations.h5": 10, "explanations.part-000001.h5": 4}.get(full_at, 0)
    assert_done(out, "\n".join(printed))
    assert not any(name.startswith(".") for name in left_over(out))
    assert runner.run(explainer(), pictures, out, batch=4).done_before == len(printed)
    assert_same(read(out), read(whole))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be taken beforehand")
def test_no_room_for_the_result(folder, model, tmp_path):
    """HDF5 itself would bring the process down."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)); {COMMAND}"
    call = ["explain", model, folder, "-o", tmp_path / "out"]
    run = fastdtd(*call, code=limited)
    assert run.returncode == 1
    assert run.stdout.count(".png  ") == 10
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("fastdtd: cannot write to")
    assert "File too large" in run.stderr
    assert fastdtd(*call).stdout.startswith("0 explained, 10 more were done before")
    assert len(read(tmp_path / "out")["file"]) == 10
    size = Path(tmp_path / "out" / runner.RESULT).stat().st_size
    assert size < 600_000  # what was taken too much is given back
