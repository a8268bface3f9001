"""The command line, as people call it: what it prints, where, and with which exit status."""

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastdtd
from fastdtd import cli, runner, sources
from fastdtd import graph as g
from fastdtd.files import FolderLock
from fastdtd.model import Model, Preprocessing
from fastdtd.model_file import save
from fastdtd.warmup import warm_up

COMMAND = [sys.executable, "-c", "import sys; from fastdtd.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """All on disk, for commands say it when they compile some."""
    return warm_up()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a small network, that in red, green and blue looks for brightness, and pictures in these colours.
    """
    monkeypatch.chdir(tmp_path)
    layers = (g.Conv2d("conv", ("input",), np.eye(3).reshape(3, 3, 1, 1)), g.ReLU("relu", ("conv",)),
              g.GlobalAveragePool("average", ("relu",)), g.Dense("scores", ("average",), 2 * np.eye(3) - 0.5))
    names = ("n01 red, scarlet", "n02 green", "n03 blue")
    save(Model(g.Graph(layers, (3, 8, 8), (0.0, 1.0)), Preprocessing(scale=1 / 255), names), "net.h5")
    (tmp_path / "pictures").mkdir()
    for color in ("red", "lime", "blue"):
        Image.new("RGB", (12, 10), color).save(tmp_path / "pictures" / f"{color}.png")
    return tmp_path


@pytest.fixture
def run(place, capfd):
    """Runs a command in `place`: exit status, lines of standard output, lines of standard error."""
    def call(*arguments):
        try:
            status = cli.main(list(arguments))
        except SystemExit as error:  # argparse
            status = error.code
        out, err = capfd.readouterr()
        return status, out.splitlines(), err.splitlines()

    return call


def refused(result):
    """The one line that says why."""
    status, out, err = result
    assert (status, out, len(err)) == (1, [], 1)
    assert err[0].startswith("fastdtd: ")
    return err[0]


def test_explain_one_picture(run, place):
    assert run("explain", "net.h5",
               "pictures/blue.png") == (0, ["blue.png  2 n03 blue  score 1.5, relevance 1.5",
                                            "1 explained; see out/"], [])
    assert {p.name
            for p in (place / "out").iterdir()} == {"blue.png.heatmap.png", "blue.png.overlay.png", "attribution.h5",
                                                    "scores.csv", "images.csv", "manifest.json", "shards"}


def test_explain_a_folder_with_bad_pictures(run, place):
    (place / "pictures" / "bad.jpg").write_text("no picture")
    (place / "pictures" / "cut.png").write_bytes((place / "pictures" / "blue.png").read_bytes()[:50])
    status, out, err = run("explain", "net.h5", "pictures", "-o", "new/folder")
    assert status == 1
    assert [line.split("  score")[0] for line in out[:-1]] == ["blue.png  2 n03 blue", "lime.png  1 n02 green",
                                                               "red.png   0 n01 red, scarlet"]
    assert out[-1] == "3 explained, 2 failed; see new/folder/"
    assert len(err) == 2
    assert err[0].startswith("fastdtd: not explained: picture 'pictures/bad.jpg' is damaged, or not in a known format")
    assert err[1].startswith("fastdtd: not explained: picture 'pictures/cut.png' cannot be read")
    assert len(list((place / "new" / "folder").iterdir())) == 12
    assert len((place / "new" / "folder" / "failed.csv").read_text().splitlines()) == 3


def test_what_was_made_of_an_earlier_result_is_named(run, place):
    """Of a report, once a picture that had failed is explained; not where nothing changed."""
    bad = place / "pictures" / "bad.png"
    bad.write_text("no picture")
    explain = "explain", "net.h5", "pictures", "-o", "results"
    assert run(*explain)[0] == 1
    assert run("report", "results")[0] == 0
    bad.write_bytes((place / "pictures" / "red.png").read_bytes())
    assert len(run(*explain)[2]) == 1
    status, _, err = run(*explain, "--retry-failed")
    assert status == 0
    assert err == ["fastdtd: results/report.html was made before; `fastdtd report results` makes it anew"]


def test_pictures_may_follow_options(run):
    first = run("explain", "net.h5", "pictures/red.png", "pictures/blue.png", "-o", "a")
    again = (0, [*first[1][:-1], "0 explained, 2 more were done before; see a/"], [])
    assert run("explain", "net.h5", "-o", "a", "pictures/red.png", "pictures/blue.png") == again
    assert run("explain", "net.h5", "pictures/red.png", "-o", "a", "pictures/blue.png") == again
    assert len(first[1]) == 3


def test_no_picture_means_those_that_come_along(run):
    status, out, err = run("explain", "squeezenet1_1")
    assert (status, err) == (0, [])
    assert [line.split("  score")[0] for line in out] == ["chelsea.png  285 Egyptian cat", "coffee.png   967 espresso",
                                                          "2 explained; see out/"]


def test_target(run):
    for target, name in (("1", "1 n02 green"), ("n02", "1 n02 green"), ("GREEN", "1 n02 green"),
                         ("scarlet", "0 n01 red, scarlet")):
        status, out, err = run("explain", "net.h5", "pictures/lime.png", "--target", target)
        assert (status, err) == (0, [])
        assert out[0].startswith(f"lime.png  {name}  score ")
    assert out[0].endswith("score -0.5, relevance 0, score not positive: nothing to decompose")
    for target, message in (("pink", "no class is named 'pink'"), ("re", "Nearest: n01 red, scarlet; n02 green"),
                            ("3", "target 3"), ("-1", "target -1"), ("\N{SUPERSCRIPT TWO}", "no class is named"),
                            ("", "no class is named ''")):
        assert message in refused(run("explain", "net.h5", "pictures/lime.png", "--target", target))


def test_against(run, place):
    lime = "explain", "net.h5", "pictures/lime.png", "--rule", "scores=epsilon"  # scores of -0.5, 1.5, -0.5
    for against, told in (("blue", "n03 blue, explained 2"), ("0 blue", "n01 red, scarlet; n03 blue, explained 2"),
                          ("runner-up", "runner-up, explained 2"), ("others", "others, explained 0")):
        status, out, err = run(*lime, *(part for one in against.split() for part in ("--against", one)))
        assert (status, err) == (0, [])
        assert out[0].startswith(f"lime.png  1 n02 green  score 1.5 against {told}, relevance ")
    assert run("verify", "out-4")[0] == 0
    assert "against was" in refused(run(*lime, "--against", "red", "-o", "out-4"))
    assert "no class is named 'pink'" in refused(run(*lime, "--against", "pink"))
    assert "the rules derive" in refused(run(*lime[:3], "--against", "0", "--rules", "gradient"))


def test_scores_that_biases_carry(run, place):
    conv = g.Conv2d("conv", ("input",), -np.eye(3).reshape(3, 3, 1, 1), [0.7, 1.5, 1.5])
    layers = (conv, g.ReLU("relu", ("conv",)), g.GlobalAveragePool("average", ("relu",)),
              g.Dense("scores", ("average",), np.eye(3)))
    save(Model(g.Graph(layers, (3, 8, 8), (0.0, 1.0)), Preprocessing(scale=1 / 255)), "biased.h5")
    status, out, err = run("explain", "biased.h5", "pictures/red.png", "--rule", "conv=z+", "-o", "a")
    assert (status, out[0]) == (0, "red.png  1  score 1.5, relevance 0, absorbed 1.5")
    assert len(err) == 1
    assert err[0].startswith("fastdtd: 100% of what was explained was absorbed by layers, and no pixel has it")
    assert run("report", "a")[0] == 0
    assert err[0].removeprefix("fastdtd: ").split(";")[0] in Path("a/report.html").read_text()
    assert run("explain", "biased.h5", "pictures/red.png", "-o", "b")[2] == []  # by zB
    assert run("report", "b")[0] == 0
    assert "and no pixel has it" not in Path("b/report.html").read_text()


def test_channels(run, place):
    """Each colour's channel has all relevance of a picture in that colour."""
    (place / "pictures" / "bad.png").write_bytes(b"no picture")
    status, out, err = run("channels", "net.h5", "pictures", "--layer", "conv", "--channels", "2", "-o", "c")
    assert status == 1
    assert out == ["channel 0  33.3% on average  red.png", "channel 1  33.3% on average  lime.png",
                   "3 explained, 1 failed; see c/"]
    assert len(err) == 1
    assert "bad.png" in err[0]
    table = Path("c/channels.csv").read_text().splitlines()
    assert table[0] == "channel,mean_share,rank,file,share,target,class"
    assert table[1:] == ['0,0.333333,0,red.png,1,0,"n01 red, scarlet"', "1,0.333333,0,lime.png,1,1,n02 green",
                         "2,0.333333,0,blue.png,1,2,n03 blue"]
    grid = np.asarray(Image.open("c/channels.png")).astype(int)
    assert grid.shape[0] == 2 * (144 + 6)
    assert (abs(grid[:, 130:274] - grid[:, 130:274, :1]) > 100).any()  # red on grey
    assert (grid[:, 280:] == 255).all()  # where the channels have no relevance
    for options, message in ((("--layer", "conv9"), "no layer 'conv9'; it has conv, relu"),
                             (("--layer", "conv", "--rules", "gradient"), "the rules derive"),
                             (("--layer", "conv", "--channels", "0"), "--channels is 0"),
                             (("--layer", "conv", "--target", "pink"), "no class is named 'pink'")):
        assert message in refused(run("channels", "net.h5", "pictures/red.png", *options))
    assert "no picture can be explained" in refused(run("channels", "net.h5", "pictures/bad.png", "--layer", "conv"))


def test_rule(run):
    ruled = run("show", "net.h5", "--rule", "conv=w2", "--rule", "score*=flat")[1]
    assert [line.split()[-1] for line in ruled if line.startswith(("conv", "scores"))] == ["w2", "flat"]
    assert run("explain", "net.h5", "pictures", "--rule", "conv=flat")[0] == 0
    for rule, message in (("conv=magic", "for 'conv': rule 'magic' is unknown"),
                          ("nothing=w2", "no layer with a rule is named 'nothing'"), ("scores=winner",
                                                                                      "does not apply to Dense"),
                          ("scores=zB", "rule 'zB' needs bounds"), ("conv=", "rule ''")):
        for command in (["show", "net.h5"], ["explain", "net.h5", "pictures"]):
            assert message in refused(run(*command, "--rule", rule))
    for rule in ("conv", "=w2"):
        status, _, err = run("show", "net.h5", "--rule", rule)
        assert (status, "is no LAYER=RULE" in err[-1]) == (2, True)


def test_memory(run):
    said = [run("explain", "net.h5", "pictures", *options, "-o", f"o{i}")[1][:-1] for i, options in enumerate(
        ([], ["--memory", "1MiB"], ["--memory=2GB"]))]
    assert said[0] == said[1] == said[2]
    assert len(said[0]) == 3


@pytest.mark.slow
def test_device(run, simulator):
    cpu = run("explain", "net.h5", "pictures", "-o", "a")
    for i, options in enumerate((["--device", "cuda"], ["--device", "cuda:0", "--precision", "3xtf32"],
                                 ["--device", "auto"])):
        status, out, _ = run("explain", "net.h5", "pictures", "-o", f"out{i}",
                             *options)  # what the simulator is, it says on standard error
        assert (status, out[:-1]) == (0, cpu[1][:-1])


def test_warmup(run, kernels):
    assert run("warmup") == (0, [f"all kernels are compiled and kept in {kernels}"], [])


def test_outputs(run, place):
    assert run("explain", "net.h5", "pictures/red.png", "--outputs", "overlay")[0] == 0
    assert [p.name for p in (place / "out").glob("*.png")] == ["red.png.overlay.png"]
    for outputs in ("", "heatmap,picture", "heatmap,,overlay"):
        assert "required: some of heatmap, overlay, relevance" in refused(
            run("explain", "net.h5", "pictures", "--outputs", outputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["net.h5", "pictures", "--threads", "0"], "threads is 0"),
     (["net.h5", "pictures", "--threads", "-2"], "threads is -2"),
     (["net.h5", "pictures", "--batch", "0"], "batch is 0"),
     (["net.h5", "pictures", "--memory", "2"], "memory is '2'; required: a number with one of the units"),
     (["net.h5", "pictures", "--memory", "0.5KiB"], "one image takes "),
     (["net.h5", "pictures", "--device", "gpu"], "device 'gpu' is unknown; required: 'cpu', 'cuda'"),
     (["net.h5", "pictures", "--precision", "tf32"], "precision 'tf32' is for GPUs"),
     (["net.h5", "pictures", "--device", "cuda", "--precision", "half"
       ], "precision 'half' is unknown; required: one of fp32, tf32"),
     (["none.h5", "pictures"], "'none.h5' does not exist"), (["alexnet", "pictures"], "(bundled: squeezenet1_1)"),
     (["pictures", "pictures"], "cannot be opened: Is a directory"),
    (["pictures/red.png", "pictures"], "is not an HDF5 file"),
     (["net.h5", "none.png"], "'none.png' does not exist"), (["net.h5", "out"], "'out' does not exist"),
     (["net.h5", "."], ""), (["net.h5", "pictures", "-o", "net.h5"], "cannot write to 'net.h5'"),
     (["net.h5", "pictures", "-o", "net.h5/out"], "cannot write to 'net.h5/out'"),
     pytest.param(["net.h5", "pictures", "-o", "/proc/out"], "cannot write to '/proc/out'", marks=pytest.mark.skipif(
         sys.platform != "linux", reason="there is no /proc"))])
def test_explain_refuses(run, place, arguments, message):
    if arguments[1] == ".":
        (place / "empty").mkdir()
        arguments, message = ["net.h5", "empty"], "no picture was found in empty"
    assert message in refused(run("explain", *arguments))


def test_no_memory(run, monkeypatch):
    def explode(*arguments):
        raise MemoryError

    monkeypatch.setattr(sources, "find", explode)
    assert "out of memory" in refused(run("explain", "net.h5", "pictures"))


def test_calls_that_cannot_be_understood(run):
    for arguments, message in (([], "required: COMMAND"), (["explain"], "required: MODEL"),
                               (["explode"], "invalid choice: 'explode'"),
                               (["explain", "net.h5", "a.png", "--outputz",
                                 "b"], "unrecognized arguments: --outputz b"), (["show", "net.h5", "other.h5"],
                                                                                "unrecognized arguments: other.h5"),
                               (["explain", "net.h5", "--batch", "many"],
                                "invalid int value: 'many'"), (["convert", "net.onnx", "net.h5", "--size",
                                                                "nan"], "'nan' is no size")):
        status, out, err = run(*arguments)
        assert (status, out) == (2, [])
        assert message in err[-1]


def test_help(run):
    for command in ([], ["explain"], ["verify"], ["analyze"], ["convert"], ["evaluate"], ["show"], ["warmup"]):
        status, out, err = run(*command, "--help")
        assert (status, err) == (0, [])
        assert max(map(len, out)) <= 140
    assert run("--version") == (0, [f"fastdtd {fastdtd.__version__}"], [])


@pytest.mark.slow
def test_progress_bar(place):
    """On a terminal, for several pictures only."""
    for module in ("pty", "fcntl", "termios"):
        pytest.importorskip(module)
    import fcntl
    import pty
    import termios

    for arguments, wanted in ((["pictures"], True), (["pictures/red.png"], False)):
        terminal, stderr = pty.openpty()
        fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        result = subprocess.run([*COMMAND, "explain", "net.h5", *arguments], stdout=subprocess.PIPE, stderr=stderr,
                                check=True, text=True)
        os.write(stderr, b"end")
        shown = os.read(terminal, 100_000).decode()
        os.close(stderr)
        os.close(terminal)
        assert ("image/s" in shown) == wanted
        assert wanted or shown == "end"
        assert result.stdout.splitlines()[-1] == ("3 explained; see out/" if wanted else
                                                   "1 explained; see out-2/")  # which holds the three
        assert "\r" not in result.stdout


def test_show(run):
    status, out, err = run("show", "net.h5")
    assert (status, err) == (0, [])
    assert out[0].split() == ["layer", "type", "reads", "output", "parameters", "domain", "rule"]
    assert out[2].split() == ["conv", "Conv2d", "input", "3x8x8", "9", "box", "zB"]
    assert "input     3x8x8, rgb, stretch, (pixel * 0.00392157 - 0) / 1" in out
    assert "weights   18 parameters, 72 B" in out
    assert "cost      969 multiply-adds forward and 969 backward, 2.33 kB of activations, for one picture" in out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["show", "explain"])
def test_standard_output_that_cannot_be_written(place, command):
    arguments = [*COMMAND, command, "net.h5", *(["pictures"] if command == "explain" else [])]
    full = Path("/dev/full")
    if full.is_char_device():  # some systems and containers have none, and opening it would make a file
        with full.open("w") as output:
            result = subprocess.run(arguments, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
        assert (result.returncode, result.stderr) == (1, "fastdtd: standard output: No space left on device\n")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as `| head` does when it has seen enough
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_names_that_the_terminal_cannot_show(place):
    (place / "pictures" / "red.png").rename(place / "pictures" / "größe.png")
    result = subprocess.run([*COMMAND, "explain", "net.h5", "pictures"], capture_output=True, check=True,
                            env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"})
    assert result.stderr == b""
    assert b"gr\\xf6\\xdfe.png" in result.stdout


# ---- convert: only how it reads its arguments ------------------------------------------------------------------------


@pytest.fixture
def converted(run, monkeypatch):
    """What convert hands on."""
    from fastdtd import importers

    def call(*arguments):
        got = {}
        network = Model(g.Graph((g.Flatten("flat", ("input",)),), (1, 2, 2)), Preprocessing(None))
        monkeypatch.setattr(
            importers, "convert",
            lambda source, weights, **options: got.update(options, source=source, weights=weights) or network)
        status, out, err = run("convert", *arguments)
        assert (status, err) == (0, [])
        assert out == ["new.h5: 1 layers, 0 parameters; `fastdtd show new.h5` lists them"]
        return got

    return call


def test_convert_arguments(converted):
    assert converted("a.onnx", "new.h5") == {
        "source": "a.onnx", "weights": None, "color": None, "size": None, "resize": "stretch", "mean": 0.0, "std": 1.0,
        "scale": 1.0, "box": None, "labels": None, "verify": None, "max_constants": None, "output": None
    }
    got = converted("a.prototxt", "a.caffemodel", "new.h5", "--color", "bgr", "--size", "227,224", "--resize", "crop",
                    "--mean=-1,2,3", "--std", "4", "--scale", "0.5", "--box=-104:151,-117:138,-123:132", "--labels",
                    "names.txt", "--no-verify", "--max-constants", "4GiB")
    assert got == {
        "source": "a.prototxt", "weights": "a.caffemodel", "color": "bgr", "size": (227, 224), "resize": "crop",
        "mean": [-1, 2, 3], "std": 4, "scale": 0.5, "box": [(-104, 151), (-117, 138),
                                                            (-123, 132)], "labels": "names.txt",
        "verify": False, "max_constants": "4GiB", "output": None
    }
    assert converted("a.onnx", "new.h5", "--box=-3,3", "--size", "28")["box"] == (-3, 3)
    assert converted("a.onnx", "new.h5", "--size", "28")["size"] == (28, 28)
    assert converted("a.onnx", "new.h5", "--verify")["verify"] is True


@pytest.mark.parametrize(("option", "message"), [("--box=3", "is no box"), ("--box=1,2,3", "is no box"),
                                                 ("--box=1:2:3", "is no box"), ("--box=a,b", "is no box"),
                                                 ("--box=1:2,3", "is no box"), ("--box=", "is no box"),
                                                 ("--size=1,2,3", "is no size"), ("--size=2.5", "is no size"),
                                                 ("--size=inf,1", "is no size"), ("--size=", "is no size"),
                                                 ("--mean=1,b", "is no list of numbers"),
                                                 ("--std=", "is no list of numbers"),
                                                 ("--scale=big", "invalid float value"),
                                                 ("--color=red", "invalid choice"), ("--dtype=int8", "invalid choice")])
def test_convert_options_that_are_none(run, option, message):
    status, out, err = run("convert", "a.onnx", "new.h5", option)
    assert (status, out) == (2, [])
    assert message in err[-1]


def test_convert_without_a_file(run, place):
    for source in (["none.onnx"], ["none.prototxt", "none.caffemodel"], ["net.h5"], ["."]):
        refused(run("convert", *source, "new.h5"))
    assert not (place / "new.h5").exists()


def test_rules_by_name(run):
    status, out, _ = run("show", "net.h5", "--rules", "innvestigate.deep_taylor")
    assert status == 0
    plain = "alpha-beta(alpha=1, beta=0, epsilon=0, bias=ignored)"
    shown = [
        line.partition("  ")[0] + line.rpartition("  ")[2] for line in out
        if line.startswith(("conv ", "average ", "scores "))
    ]
    assert shown == [f"conv{plain}", "averageflat", f"scores{plain}"]
    changed = ["--rule", "type:conv2d=w2", "--rule", "scores=epsilon(epsilon=0.25, bias=ignored)"]
    out = run("show", "net.h5", "--rules", "innvestigate.deep_taylor", *changed)[1]
    shown = [
        line.partition("  ")[0] + line.rpartition("  ")[2] for line in out
        if line.startswith(("conv ", "average ", "scores "))
    ]
    assert shown == ["convw2", "averageflat", "scoresepsilon(epsilon=0.25, bias=ignored)"]
    assert run("explain", "net.h5", "pictures", "--rules", "innvestigate.deep_taylor", *changed)[0] == 0
    assert "rules 'lrp' is unknown" in run("show", "net.h5", "--rules", "lrp")[2][0]


def test_list_of_rules(run):
    status, out, _ = run("rules")
    assert status == 0
    assert any(line.split()[0] == "zennit.epsilon_plus" for line in out if line)
    assert "  gamma(gamma=0.25, epsilon=1e-06, bias=absorbed)" in out


def test_ledger(run):
    """What came to a layer went on to the next or was absorbed, and all of it makes up the scores."""
    status, out, _ = run("explain", "net.h5", "pictures", "--ledger", "--outputs", "relevance")
    assert status == 0
    rows = {line.split()[0]: line.split()[1:] for line in out[4:-3]}
    assert list(rows) == ["scores", "average", "conv"]
    total = sum(float(line.split("score ")[1].split(",")[0]) for line in out[:3])
    came = [float(row[0]) for row in rows.values()]
    assert came[0] == pytest.approx(total, rel=1e-4)
    for (given, went_on, absorbed, share), following in zip(rows.values(),
                                                            [*came[1:], float(out[-3].split()[2])], strict=True):
        assert float(given) == pytest.approx(float(went_on) + float(absorbed), rel=1e-4)
        assert float(went_on) == pytest.approx(following, rel=1e-4)  # layers in a row
        assert float(share.rstrip("%")) == pytest.approx(100 * float(absorbed) / total, abs=1e-2)
    assert out[-2].split()[0] == "all"
    assert out[-2].split()[-1] == "100.000%"


@pytest.mark.parametrize("other", [RuntimeError, OSError, fastdtd.InputError, MemoryError])
def test_an_interrupt_that_became_another_error(run, monkeypatch, capfd, other):
    """Libraries that are interrupted where they hold a lock raise what they like."""
    def interrupted(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            pass  # as native code forgets it
        raise other("in its place")

    ended = []
    monkeypatch.setattr(runner, "run", interrupted)
    monkeypatch.setattr(cli.os, "_exit", lambda status: ended.append(status) or sys.exit(status))
    status, out, err = run("explain", "net.h5", "pictures")
    assert (status, ended, out) == (130, [130], [])
    assert err == ["fastdtd: interrupted; what was reported as done is on disk"]


def test_names_do_not_command_the_terminal(run):
    """Files have them from strangers."""
    evil = "\x1b[2J\x1b]0;owned\x07\r\n\u202e"
    layers = (g.Conv2d(f"conv{evil}", (g.INPUT,), np.ones((2, 3, 1, 1))), g.GlobalAveragePool(
        f"scores{evil}", (f"conv{evil}",)))
    model = Model(g.Graph(layers, (3, 8, 8), (0, 1)), Preprocessing(), (f"a{evil}", f"b{evil}"), {"source": evil})
    save(model, "net.h5")
    texts = [repr(model), repr(fastdtd.Explainer(model)(np.ones((1, 3, 8, 8)))),
             *run("show", "net.h5")[1], *run("explain", "net.h5", "pictures", "--ledger")[1],
             *run("explain", "net.h5", "pictures", "-o", "other", "--rule", f"x{evil}=flat")[2]]
    assert "[2J" in "".join(texts)
    assert all(c.isprintable() or c == "\n" for text in texts for c in text)


def test_evaluate(run, place):
    status, out, err = run("evaluate", "net.h5", "pictures", "-o", "new/folder", "--region", "2", "--order", "both",
                           "--methods", "dtd,random,edges")
    assert (status, err) == (0, [])
    assert out[0].split() == ["method", "order", "AOPC", "standard", "error", "pictures"]
    assert [line.split()[:2] + line.split()[-1:] for line in out[1:-1]] == [
        ["dtd", "most", "3"], ["dtd", "least", "3"], ["random", "any", "3"], ["edges", "most", "3"],
        ["edges", "least", "3"]]
    assert out[-1] == "3 evaluated; see new/folder/"
    assert {p.name for p in (place / "new" / "folder").iterdir()} == {"evaluation.csv", "evaluation.png"}
    table = (place / "new" / "folder" / "evaluation.csv").read_text().splitlines()
    assert table[:2] == ["method,order,step,mean,standard_error", "dtd,most,0,0,0"]
    assert len(table) == 1 + 5 * 17
    again = run("evaluate", "net.h5", "pictures", "-o", "again", "--region", "2", "--order", "both", "--methods",
                "dtd,random,edges", "--threads", "1", "--memory", "1MiB")
    assert again[1][:-1] == out[:-1]
    assert (place / "again" / "evaluation.csv").read_text().splitlines() == table


def test_evaluate_with_bad_pictures_and_targets(run, place):
    (place / "pictures" / "bad.jpg").write_text("no picture")
    status, out, err = run("evaluate", "net.h5", "pictures", "--region", "4", "--target", "green", "--methods", "dtd")
    assert (status, out[-1]) == (1, "3 evaluated, 1 failed; see out/")
    assert len(err) == 2  # a line for the red and the blue one, of which green has nothing to explain
    assert err[0].startswith("fastdtd: 2 of 3 targets have a score that is not positive")
    assert err[1].startswith("fastdtd: not evaluated: picture 'pictures/bad.jpg' is damaged")


@pytest.mark.parametrize(("arguments", "message"), [
    (["pictures"], "region is 9; required: a whole number from 1 to 8, of the input of 8 x 8 pixels"),
    (["pictures", "--region", "4", "--steps", "5"], "steps is 5; required: a whole number from 1 to 4, for there are 4 "
     "regions of 4 x 4 pixels"),
    (["pictures", "--region", "2", "--methods", "dtd,magic"], "method 'magic' is unknown; required: some of dtd, "),
    (["pictures", "--region", "2", "--methods", ""], "method '' is unknown"),
    (["pictures", "--region", "2", "--order", "first"], "order is 'first'; required: most, least or both"),
    (["pictures", "--region", "2", "--target", "pink"], "no class is named 'pink'"),
    (["pictures", "--region", "2", "--memory", "2"], "memory is '2'"),
    (["pictures", "--region", "2", "--device", "gpu"], "device 'gpu' is unknown"),
    (["none"], "'none' does not exist"), (["pictures", "-o", "net.h5"], "cannot write to 'net.h5'"),
])
def test_evaluate_refuses(run, arguments, message):
    assert message in refused(run("evaluate", "net.h5", *arguments))


def test_two_runs_into_one_folder(run, place):
    with FolderLock(place):
        line = refused(run("explain", "net.h5", "pictures", "-o", "."))
    assert line.startswith(f"fastdtd: another run is writing to '.': process {os.getpid()} on ")
    assert line.endswith("; wait until it has finished, end it, or choose another folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_named_pipes_are_not_waited_for(run, place):
    os.mkfifo("pipe.onnx")
    assert "named pipe" in refused(run("convert", "pipe.onnx", "new.h5"))
    status, _, err = run("explain", "net.h5", "pipe.onnx")
    assert (status, len(err)) == (1, 1)
    assert "named pipe" in err[0]


@pytest.mark.parametrize(("option", "value"), [("--threads", "1025"), ("--threads", "0"), ("--threads", "9" * 400),
                                               ("--memory", "9" * 5000 + "GiB"), ("--memory", "-1"),
                                               ("--batch", "0"), ("--target", "9" * 5000), ("--device", "\udce9"),
                                               ("--precision", ""), ("--outputs", ""), ("--rules", "x" * 5000)])
def test_strange_options(run, option, value):
    assert len(refused(run("explain", "net.h5", "pictures", option, value))) < 1000
