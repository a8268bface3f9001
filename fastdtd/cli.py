"""The command line: `fastdtd explain`, `report`, `analyze`, `evaluate`, `convert`, `embed` and others."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import io
import itertools
import math
import os
import re
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from fastdtd.errors import FastDTDError, InputError, printable

_MAIN = """\
Which pixels does a network's prediction come from?

  fastdtd explain squeezenet1_1 cat.jpg            with the bundled network
  fastdtd convert net.onnx net.h5 --labels names.txt
  fastdtd show net.h5                              its layers and the rule each will get
  fastdtd explain net.h5 pictures/ -o out          a heatmap and an overlay for each picture
  fastdtd report out                               a page to look at them: out/report.html
  fastdtd analyze out                              heatmaps of a class compared, for ViRelAy
  fastdtd evaluate net.h5 pictures/ -o out         is the heatmap right? its curve beside other methods'
  fastdtd channels net.h5 pictures/ --layer conv5  what a layer's channels find, picture by picture
  fastdtd embed net.h5 -o lib                      a library for C that explains, without Python
  fastdtd warmup                                   compile ahead what is otherwise compiled on first use

`fastdtd COMMAND --help` says more and gives examples.
"""
_EXPLAIN = """\
Explain what a network sees in images, by deep Taylor decomposition.

SOURCE is pictures, folders of pictures, or sets of images. OUT gets attribution.h5 with the relevance of each pixel,
scores, targets and sums; scores.csv, the same without relevance; failed.csv with the images that cannot be read or
drawn, and why; and of the first images NAME.heatmap.png (white to red: relevance) and NAME.overlay.png (the same over
the picture). Up to 100 images get a line: the class that is explained, its score, and the sum of the relevance, which
is the same but for what a layer absorbed. The exit status is 1 where an image failed.

A run that was cut off goes on where it was when the same command is given again. OUT is one run's at a time.
"""
_EXPLAIN_EXAMPLES = """\
examples:
  fastdtd explain squeezenet1_1                              two bundled photographs
  fastdtd explain squeezenet1_1 cat.jpg dog.jpg -o out
  fastdtd explain net.h5 photos/ -o out --target tabby       one class, whatever wins; or its number
  fastdtd explain net.h5 imagenet/val/ -o out --true-label --draw 0 --store float16 --stats
  fastdtd explain net.h5 images.csv -o out --top 5           the five highest scores of each
  fastdtd explain net.h5 cat.jpg --against runner-up         why this class, and not the next
  fastdtd explain net.h5 cat.jpg --through conv5=3,17        what goes through two channels of a layer
  fastdtd explain net.h5 cat.jpg --rule 'conv1*=flat' --rule 'pool*=proportional'
  fastdtd explain net.h5 cat.jpg --rules zennit.epsilon_plus --rule 'type:dense=epsilon(epsilon=0.25)'
  fastdtd explain net.h5 cat.jpg --ledger                    where the score went, layer by layer
  fastdtd explain vgg16.h5 photos/ --memory 2GiB             no more than that for the network's activations
  fastdtd explain vgg16.h5 photos/ --device cuda             on all GPUs; cuda:1 is one of them
  fastdtd explain vgg16.h5 photos/ --device cuda --precision 3xtf32
"""
_REPORT = """\
Write a finished run as a page to look at: OUT/report.html, which any browser opens from disk, without a server and
without a network. Its thumbnails are in OUT/report.

The page has picture, heatmap and overlay of each explanation, with class, score, sum of relevance, what layers
absorbed, and the true class where the source said it. They can be searched by file name, filtered by class, and by
whether the winner is the true class, and sorted by score, or by how concentrated relevance is: the share of it in the
10 % of pixels that have most. It has the mean heatmap of each class, what was run, and which images failed, and why.

Pictures are read again from where the run found them; of those that are gone the heatmap alone is shown.
"""
_REPORT_EXAMPLES = """\
examples:
  fastdtd explain squeezenet1_1 photos/ -o out
  fastdtd report out                      then open out/report.html
  fastdtd report out --images 1000        of a large run, explanations of images at even distances

keys in the page: arrows move, Enter enlarges, Esc closes, / searches
"""
_VERIFY = """\
Check a finished run: every shard is there, with its checksum; every image is in one of them; relevance is finite and,
with what layers absorbed, sums to the scores. The exit status is 1 where anything is wrong.
"""
_ANALYZE = """\
Compare the heatmaps of a finished run with one another, class by class, to see by what different features a network
knows a class: a cluster of heatmaps that all lie on a watermark, say. That is spectral relevance analysis (SpRAy), and
ViRelAy shows it in the browser. OUT gets

  analysis.h5      of each class embeddings (principal components; eigenvectors of the graph of nearest neighbours) and
                   clusterings (k-means on these eigenvectors, for 2 to 8 clusters) of its heatmaps
  input.h5         the images as the network saw them, read again: 3 bytes a pixel
  label-map.json   names of classes
  project.yaml     what ViRelAy opens

It needs scikit-learn: pip install "fastdtd[analysis]". ViRelAy (pip install virelay) is a program of its own.
"""
_ANALYZE_EXAMPLES = """\
examples:
  fastdtd explain net.h5 imagenet/val/ -o out --labels --store float16
  fastdtd analyze out                    heatmaps that explain the same class together
  fastdtd analyze out --by label         heatmaps of images with the same true label
  virelay out/project.yaml               then open http://localhost:8000
"""
_EVALUATE = """\
Is the heatmap right? Replace the regions that a method finds most relevant by noise, one after the other, and see how
fast the score of the explained class falls: the region-perturbation curve of Samek et al. 2017.

Prints for each method the area over its curve (AOPC): the fall of the score, on average over steps and pictures, with
its standard error. The higher the better, if the most relevant regions go first; the lower the better, if the least
relevant do. A method that is no better than `random` or `edges` has not found what the network looks at. Writes to OUT
evaluation.csv, which has the curves, and evaluation.png, which shows them.

Methods are the presets that `fastdtd rules` lists, among them gradient*input and sensitivity (the squared gradient);
`random`, an order that means nothing; and `edges`, the picture's own edges, which know no network.

It takes a forward pass for each picture, method and step. docs/howto-evaluate.md says what the measure does not say.
"""
_EVALUATE_EXAMPLES = """\
examples:
  fastdtd evaluate squeezenet1_1                             two bundled photographs; take some dozens of your own
  fastdtd evaluate net.h5 photos/ -o out --order both        least relevant first, too
  fastdtd evaluate net.h5 photos/ --methods dtd,zennit.epsilon_plus,random
  fastdtd evaluate net.h5 digits/ --region 3 --steps 40      for a small input
  fastdtd evaluate net.h5 photos/ --repeats 5 --seed 1       less noise in the curves; other noise
  fastdtd evaluate net.h5 photos/ --against runner-up        how fast the winner's lead falls
  fastdtd evaluate segmentation.h5 streets/ --target road    the sum of a class's map
"""
_CHANNELS = """\
Which features does a layer have, and in which pictures? Explain pictures, and list for each channel of a layer those in
which it has the largest share of the layer's relevance.

Prints the channels with the largest shares on average, and writes to OUT channels.csv, which has the pictures of every
channel, and channels.png: a row for each of the first channels, with its pictures and, on each, the relevance that goes
through this channel alone (concept relevance propagation).
"""
_CHANNELS_EXAMPLES = """\
examples:
  fastdtd channels squeezenet1_1 photos/ --layer fire9/concat -o out
  fastdtd channels net.h5 photos/ --layer conv5 --target tabby --channels 20 --pictures 5
  fastdtd channels segmentation.h5 streets/ --layer conv5 --target road@max
"""
_CONVERT = """\
Convert a network to fastdtd's own format: from ONNX or Keras (one file: .onnx, .keras, .h5), from Caffe (.prototxt
and .caffemodel) or from PyTorch.

A PyTorch network is given as MODULE:CALLABLE, such as torchvision.models:resnet18: MODULE is imported and CALLABLE
called, without arguments. That runs your own code, by its name; nothing that a file holds is run. WEIGHTS is then a
state dict, as torch.save(module.state_dict(), path) writes it; without one the weights are those that CALLABLE
gives, random ones in torchvision.

How pictures are prepared is not in those files, so say it: the network's input is (pixel * SCALE - MEAN) / STD,
with pixels 0..255 and the channels in the order of COLOR. With a value box (the minimum and the maximum of each
channel after that) the first layer gets the z^B rule, which explains pixels best; without one it gets w^2.

The scores for two random inputs are compared with the source's own, where what runs it is installed, and nothing is
written where they differ.
"""
_CONVERT_EXAMPLES = """\
examples:
  fastdtd convert net.onnx net.h5 --scale 0.00392157 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \\
      --labels names.txt
  fastdtd convert net.onnx net.h5 --verify                   fail where no onnxruntime is there to compare scores with
  fastdtd convert net.keras net.h5 --box=0,255               from Keras 2 or 3, or net.h5 as they wrote before
  fastdtd convert deploy.prototxt net.caffemodel net.h5 --color bgr --mean 104,117,123 \\
      --box=-104:151,-117:138,-123:132 --labels synset_words.txt
  fastdtd convert torchvision.models:resnet18 resnet18.pth net.h5 --size 224 --resize crop
"""
_SHOW = "Print a network's layers: shape, parameters, the domain of what each reads, and the rule it will get."
_SHOW_EXAMPLES = """\
examples:
  fastdtd show squeezenet1_1
  fastdtd show net.h5 --rule 'conv1=w2'
"""
_RULES = """\
List the presets and rules by which relevance can be redistributed, with their parameters. docs/method.md has the
formulas.
"""
_EMBED = """\
Write a library that predicts and explains without Python, for programs in C or any language that calls C.

DIR gets NAME.h, which documents the functions; NAME.o and libNAME.a; libNAME.so, where there is a linker; and with
--weights file NAME.weights. No C compiler is needed. The library needs nothing else: it allocates no memory, keeps no
state, calls no other library, and any number of threads may call it. docs/howto-embed.md leads to a linked program.
"""
_EMBED_EXAMPLES = """\
examples:
  fastdtd embed squeezenet1_1 -o lib                         for this machine's architecture, weights inside
  fastdtd embed net.h5 -o lib --name net --weights file      weights in a file that programs map
  fastdtd embed net.h5 -o lib --target aarch64               for another one
  fastdtd embed net.h5 -o web --target wasm32 --weights compact
  fastdtd embed net.h5 -o lib --algorithms small             less memory, more time
  fastdtd embed net.h5 -o lib --rules zennit.epsilon_plus
"""
_WARMUP = """\
Compile all kernels ahead, so that nobody waits for it later: when a container image is built, say.

Kernels are otherwise compiled when they are first used, which can take half a minute, and kept on disk: beside
fastdtd's own files or, where these cannot be written, in your cache folder. Environment variables say otherwise,
and must then be set for this command and for those that follow it alike:

  NUMBA_CACHE_DIR      another folder. When kernels are used it need not be writable, only hold what this command put
                       there.
  NUMBA_CPU_NAME,      the processor to compile for (default: this one). Kernels for one processor are no use to
  NUMBA_CPU_FEATURES   another, so an image that is built here and used there names one that both have. `generic`
                       alone runs everywhere, slowly.
"""
_WARMUP_EXAMPLES = """\
examples:
  fastdtd warmup
  NUMBA_CACHE_DIR=/opt/kernels fastdtd warmup

in a Dockerfile, for any x86 processor with AVX2 (nearly all since 2015):
  ENV NUMBA_CACHE_DIR=/opt/kernels NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES=+avx,+avx2,+fma
  RUN fastdtd warmup
"""
_LINES = 100  # images of which each gets a line; of more the table in OUT has all


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where something failed, 2 for a call that cannot be understood."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and "sources" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes positional arguments from one place only
        options.sources = [*options.sources, *rest]
    if isinstance(sys.stdout, io.TextIOWrapper):  # whatever a class is called, and no line of what is done held back
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        with _interrupts_kept():
            status: int = options.run(options)
            sys.stdout.flush()
    except FastDTDError as error:
        print(printable(f"fastdtd: {error}"), file=sys.stderr)
        return 1
    except MemoryError:
        print("fastdtd: out of memory; --memory 1GiB, fewer --threads or a smaller --batch take less", file=sys.stderr)
        return 1
    except OSError as error:  # almost surely of standard output, for results have errors of their own
        if not isinstance(error, BrokenPipeError):  # `| head` has seen enough
            print(f"fastdtd: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is flushed at exit
        return 1
    except KeyboardInterrupt:
        print("fastdtd: interrupted; what was reported as done is on disk", file=sys.stderr, flush=True)
        os._exit(130)  # returning would wait for all that threads have yet to compute
    return status


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Ctrl-C as KeyboardInterrupt, also where a library made another error of it (of a lock that it had taken, or of a
    comparison), and where Python drops it: in a destructor, or in what is called when an object goes."""
    seen = []

    def interrupt(*_: object) -> None:
        seen.append(True)
        raise KeyboardInterrupt

    def dropped(one: Any) -> None:
        if issubclass(one.exc_type, KeyboardInterrupt):  # once more, when this is over
            threading.Timer(0.01, _thread.interrupt_main).start()
        else:
            report(one)

    report = sys.unraisablehook
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler and (
        threading.current_thread() is threading.main_thread())
    try:
        if is_ours:
            signal.signal(signal.SIGINT, interrupt)
            sys.unraisablehook = dropped
        yield
    except Exception:
        if seen:
            raise KeyboardInterrupt from None
        raise
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = report


def _parser() -> argparse.ArgumentParser:
    from fastdtd import __version__

    def command(name: str, text: str, examples: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, description=text, epilog=examples, help=summary,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)

    parser = argparse.ArgumentParser("fastdtd", description=_MAIN, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"fastdtd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    explain = command("explain", _EXPLAIN, _EXPLAIN_EXAMPLES, "explain pictures")
    explain.set_defaults(run=_explain)
    explain.add_argument("model", metavar="MODEL",
                         help="a model file, or the name of a bundled one: squeezenet1_1")
    explain.add_argument("sources", metavar="SOURCE", nargs="*", default=[],
                         help="pictures; folders of pictures; globs, quoted ('photos/**/*.jpg'); lists: .txt with a "
                         "path a line and, after a tab, its label, or .csv with columns such as path and label; HDF5 "
                         "files of images (set.h5, or set.h5:/DATASET; labels from a dataset \"label\" or \"labels\" "
                         "beside it); tars of pictures, not compressed, with KEY.cls beside KEY.jpg for labels "
                         "('shard-{000000..000099}.tar') (default: two bundled pictures)")
    what = explain.add_argument_group("what is explained")
    what.add_argument("--target", metavar="CLASS", action="append", default=[],
                         help="class to explain: a name or a number; may be given several times (default: each image's "
                         "winner). Where outputs are maps: CLASS for its sum over all positions, CLASS@max for its "
                         "highest score, or CLASS@Y,X (default: the highest score of all)")
    what.add_argument("--top", metavar="K", type=int, default=1, help="explain the K highest scores of each image")
    what.add_argument("--true-label", action="store_true", help="explain the class that the source says of each "
                         "image: a list, a tar, an HDF5 file, or a folder's folders by their names")
    what.add_argument("--against", metavar="CLASS", action="append", default=[],
                      help="hold the target against this class: relevance is the target's less the class's, drawn red "
                      "and blue; may be given several times, for their mean. Or runner-up, the highest other score; "
                      "others, all other classes (CLRP); or softmax-gradient (SGLRP)")
    what.add_argument("--through", metavar="LAYER=CHANNELS", action="append", default=[], type=_layer_channels,
                      help="explain only what goes through these channels of a layer, as in conv5=3,17; may be given "
                      "for several layers")
    what.add_argument("--labels", action="store_true", help="a folder's folders are named after the true classes "
                         "of what is in them, which the results then say")
    _add_rules(what)
    results = explain.add_argument_group("results")
    results.add_argument("-o", "--out", metavar="OUT", type=Path, help="folder for the results (default: out, or "
                         "out-2 where that holds another run, and so on)")
    results.add_argument("--outputs", metavar="LIST", default="heatmap,overlay,relevance",
                         help="what to write beside scores (default: %(default)s)")
    results.add_argument("--draw", metavar="N", type=_count_or_all, default=100,
                         help="draw heatmaps and overlays of the first N images, or of all; a drawing takes longer "
                         "than an explanation (default: %(default)s)")
    results.add_argument("--store", metavar="TYPE", default="float32", help="how relevance is stored: float32, float16 "
                         "or int8, scaled for each image (default: %(default)s)")
    results.add_argument("--sum-channels", action="store_true", help="store the relevance of each pixel, (1, H, W)")
    results.add_argument("--keep", metavar="SHARE", type=float, default=1.0, help="store the largest values of each "
                         "image that make up this share of its relevance, as 0.95, and zeros for others, which "
                         "--compress makes small (default: all)")
    results.add_argument("--compress", metavar="HOW", help="compress stored relevance: gzip or lzf")
    results.add_argument(
        "--ledger", action="store_true",
        help="print at the end where the scores went: to the pixels, and what each layer absorbed because none of its "
        "inputs contributed to it")
    results.add_argument("--stats", action="store_true", help="print at the end what each stage takes")
    how = explain.add_argument_group("how it runs")
    how.add_argument("--workers", "--threads", metavar="N", type=int, dest="workers", help="threads that read, "
                         "explain and draw, at most 1024 (default: all processors)")
    how.add_argument("--batch", metavar="N", type=int,
                     help="images that a thread takes at a time (default: 2 to 16, the fewer the larger the network; "
                     "on GPUs, as many as they take)")
    how.add_argument(
        "--memory", metavar="SIZE", help="the most that the network's activations may take, as in 2GiB or 500MB; with "
        "less, fewer pictures are explained at a time (default: 256 MiB, or one picture, for each thread; of a GPU 80 "
        "%% of what is free)")
    how.add_argument(
        "--max-multiply-adds", metavar="N", type=float, default=5e11,  # fastdtd.cost.MAX_MULTIPLY_ADDS takes NumPy
        help="refuse a network of which one picture takes more; `fastdtd show` says how many (default: %(default)g)")
    how.add_argument(
        "--device", metavar="DEVICE", default="cpu", help="what computes: cpu; cuda, all GPUs, which share out the "
        "pictures; cuda:N, one of them; or auto, GPUs if they can be used. GPUs need `pip install \"fastdtd[cuda]\"` "
        "(default: %(default)s)")
    how.add_argument(
        "--precision", metavar="P", help="how GPUs multiply in convolutions: tf32, the fastest, with 11 bits of each "
        "factor; 3xtf32, with float32's accuracy on the same tensor cores; or fp32, without tensor cores, which older "
        "GPUs lack (default: tf32, or fp32 on those)")

    _add_evaluate(command("evaluate", _EVALUATE, _EVALUATE_EXAMPLES, "compare heatmaps by what they say of the score"))

    _add_channels(command("channels", _CHANNELS, _CHANNELS_EXAMPLES, "rank a layer's channels, and pictures for each"))

    how.add_argument("--draft", action="store_true", help="scale JPEGs while they are decoded: faster, and "
                         "somewhat other pixels and scores")
    how.add_argument("--shard", metavar="N", type=int, help="images of a file of results: what is lost where a "
                         "run is cut off (default: 64, more for sets above 31,936 images)")
    how.add_argument("--retry-failed", action="store_true", help="make shards again that have images which failed")
    how.add_argument("--dask", metavar="ADDRESS", help="share shards out among the workers of a Dask cluster, such "
                         "as tcp://host:8786; or local, for processes of this machine")

    convert = command("convert", _CONVERT, _CONVERT_EXAMPLES, "convert an ONNX, Keras, Caffe or PyTorch network")
    convert.set_defaults(run=_convert)
    convert.add_argument("source", metavar="SOURCE",
                         help=".onnx, .keras, .h5 (of Keras) or .prototxt file, or MODULE:CALLABLE for PyTorch")
    convert.add_argument("weights", metavar="WEIGHTS", nargs="?",
                         help=".caffemodel file, with a .prototxt; state dict, with MODULE:CALLABLE")
    convert.add_argument("model", metavar="MODEL.h5", help="file to write")
    convert.add_argument("--color", choices=("rgb", "bgr", "gray"),
                         help="order of the input's channels (default: rgb, or gray for one)")
    convert.add_argument("--size", metavar="H,W", type=_size,
                         help="size of the input (default: the file's); PyTorch needs it")
    convert.add_argument(
        "--resize", choices=("stretch", "crop"), default="stretch",
        help="stretch pictures to the size, or scale them to cover it and cut out the centre (default: %(default)s)")
    convert.add_argument("--mean", metavar="M,...", type=_numbers, default=[0.0],
                         help="one number, or one for each channel (default: 0)")
    convert.add_argument("--std", metavar="S,...", type=_numbers, default=[1.0],
                         help="one number, or one for each channel (default: 1)")
    convert.add_argument("--scale", metavar="F", type=float, default=1.0,
                         help="multiplies pixels 0..255 first (default: 1)")
    convert.add_argument(
        "--box", metavar="BOX", type=_box, help="bounds of the input: LOW,HIGH for all channels, or LOW:HIGH,... one "
        "a channel; write --box=... since it begins with a minus")
    convert.add_argument("--labels", metavar="FILE", help="text file with a class name a line")
    convert.add_argument("--output", metavar="NAME", type=_number_or_name,
                         help="which of several outputs is explained, by its name or number; of ONNX and Keras also an "
                         "inner tensor or layer (default: the first)")
    convert.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, help="compare scores on random inputs with those of "
        "onnxruntime (or ONNX's reference, for small networks), Keras or the PyTorch module, and write nothing where "
        "they differ by more than 0.1 %% (default: where that is installed; --verify: fail where it is not)")
    convert.add_argument(
        "--max-constants", metavar="SIZE", help="what constants, weights and moved elements may come to while the "
        "network is read, as in 4GiB (default: 1GiB and 32 bytes for each of the source's own)")
    convert.add_argument("--dtype", choices=("float16", "float32", "float64"), default="float32",
                         help="precision of the weights in MODEL.h5 (default: %(default)s)")

    show = command("show", _SHOW, _SHOW_EXAMPLES, "print a network's layers and their rules")
    show.set_defaults(run=_show)
    show.add_argument("model", metavar="MODEL", help="a model file, or the name of a bundled one: squeezenet1_1")
    _add_rules(show)

    verify = command("verify", _VERIFY, "", "check the results of a run")
    verify.set_defaults(run=_verify)
    verify.add_argument("out", metavar="OUT", help="output folder of `fastdtd explain`")

    analyze = command("analyze", _ANALYZE, _ANALYZE_EXAMPLES, "compare the heatmaps of a run, for ViRelAy")
    analyze.set_defaults(run=_analyze)
    analyze.add_argument("out", metavar="OUT", help="output folder of `fastdtd explain`")
    analyze.add_argument("--by", choices=("target", "predicted", "label"), default="target",
                         help="which heatmaps are a class: those that explain it (target), of images for which the "
                         "network predicts it, or whose true label it is (default: %(default)s)")

    report = command("report", _REPORT, _REPORT_EXAMPLES, "write a page to look at a run's results")
    report.set_defaults(run=_report)
    report.add_argument("out", metavar="OUT", help="output folder of `fastdtd explain`")
    report.add_argument("--images", metavar="N", type=int, default=10_000,  # fastdtd.report.SHOWN takes NumPy
                        help="the most explanations in the page, up to 50000 (default: %(default)s)")
    report.add_argument("--workers", metavar="N", type=int, help="threads that read pictures and draw (default: all "
                        "processors)")

    embed = command("embed", _EMBED, _EMBED_EXAMPLES, "write a library that explains without Python")
    _add_embed(embed)
    warmup = command("warmup", _WARMUP, _WARMUP_EXAMPLES, "compile all kernels ahead, for images and containers")
    warmup.set_defaults(run=_warmup)
    command("rules", _RULES, "", "list presets and rules").set_defaults(run=_list_rules)
    return parser


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_evaluate)
    parser.add_argument("model", metavar="MODEL", help="a model file, or the name of a bundled one: squeezenet1_1")
    parser.add_argument("sources", metavar="SOURCE", nargs="*", default=[],
                        help="images, as `fastdtd explain` takes them (default: two bundled ones)")
    parser.add_argument("-o", "--out", metavar="OUT", type=Path, default=Path("out"),
                        help="folder for the results (default: %(default)s)")
    parser.add_argument("--rule", metavar="LAYER=RULE", action="append", default=[], type=_rule,
                        help="one more method: dtd with another rule for a layer, for all that a pattern matches, or "
                        "for a type such as type:dense; may be given several times")
    parser.add_argument("--methods", metavar="LIST", default="dtd,gradient*input,sensitivity,random,edges",
                        help="methods to compare, separated by commas (default: %(default)s)")
    parser.add_argument("--order", metavar="ORDER", default="most",
                        help="which regions go first: most or least, the most or least relevant; or both (default: "
                        "%(default)s)")
    parser.add_argument("--steps", metavar="N", type=int,
                        help="regions that are replaced (default: 100, or all where there are fewer)")
    parser.add_argument("--region", metavar="N", type=int, default=9,
                        help="side of a region, in pixels of the input (default: %(default)s)")
    parser.add_argument("--repeats", metavar="N", type=int, default=1,
                        help="of each picture, with other noise (default: %(default)s)")
    parser.add_argument("--target", metavar="CLASS",
                        help="class to explain: a name or a number (default: each picture's winner). Where outputs are "
                        "maps: CLASS, CLASS@max or CLASS@Y,X, as in `fastdtd explain`; the score is their sum")
    parser.add_argument("--against", metavar="CLASS", action="append", default=[],
                        help="hold the target against this class: the score that falls is the target's less the "
                        "class's; may be given several times, for their mean. Or runner-up, the highest other score")
    parser.add_argument("--through", metavar="LAYER=CHANNELS", action="append", default=[], type=_layer_channels,
                        help="heatmaps of what goes through these channels of a layer alone, as in conv5=3,17; needs "
                        "--methods without those that derive")
    parser.add_argument("--seed", metavar="N", type=int, default=0,
                        help="of the noise: the same gives the same numbers (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, help="threads, at most 1024 (default: all processors)")
    parser.add_argument("--memory", metavar="SIZE", help="the most that the network's activations may take, of all "
                        "methods together, as in 2GiB or 500MB")
    parser.add_argument("--device", metavar="DEVICE", default="cpu",
                        help="what computes: cpu, cuda, cuda:N or auto, as in `fastdtd explain` (default: %(default)s)")


def _add_channels(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_channels)
    parser.add_argument("model", metavar="MODEL", help="a model file, or the name of a bundled one: squeezenet1_1")
    parser.add_argument("sources", metavar="SOURCE", nargs="*", default=[],
                        help="images, as `fastdtd explain` takes them (default: two bundled ones)")
    parser.add_argument("--layer", metavar="L", required=True, help="the layer, by the name that `fastdtd show` prints")
    parser.add_argument("--target", metavar="CLASS",
                        help="class to explain: a name or a number (default: each picture's winner). Where outputs are "
                        "maps: CLASS, CLASS@max or CLASS@Y,X, as in `fastdtd explain`")
    parser.add_argument("--channels", metavar="N", type=int, default=8,
                        help="channels that are printed and drawn (default: %(default)s)")
    parser.add_argument("--pictures", metavar="N", type=int, default=8,
                        help="pictures of each channel (default: %(default)s)")
    parser.add_argument("-o", "--out", metavar="OUT", type=Path, default=Path("out"),
                        help="folder for the results (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, help="threads, at most 1024 (default: all processors)")
    parser.add_argument("--memory", metavar="SIZE", help="the most that the network's activations may take, as in 2GiB")
    parser.add_argument("--device", metavar="DEVICE", default="cpu",
                        help="what computes: cpu, cuda, cuda:N or auto, as in `fastdtd explain` (default: %(default)s)")
    _add_rules(parser)


def _add_embed(parser: argparse.ArgumentParser) -> None:
    from fastdtd.embedding import ALGORITHMS, TARGETS, WEIGHTS

    parser.set_defaults(run=_embed)
    parser.add_argument("model", metavar="MODEL", help="a model file, or the name of a bundled one: squeezenet1_1")
    parser.add_argument("-o", "--out", metavar="DIR", type=Path, default=Path("lib"),
                        help="folder for the files (default: %(default)s)")
    parser.add_argument("--name", metavar="NAME", help="what the names of functions and files begin with (default: the "
                        "model's)")
    parser.add_argument("--target", metavar="TARGET",
                        help=f"{', '.join(TARGETS)}; or any triple that LLVM knows, untested, as "
                        "TRIPLE[:CPU[:FEATURES]] (default: this machine's architecture; of x86-64 v3, with AVX2)")
    parser.add_argument("--device-cpu", action="store_true",
                        help="for this very processor: the bits that `fastdtd explain` gives here")
    parser.add_argument("--weights", metavar="HOW", choices=WEIGHTS, default="embedded",
                        help="embedded: inside of the library; file: in NAME.weights, as kernels read them; compact or "
                        "compact16: there as float32 or float16, for NAME_unpack (default: %(default)s)")
    parser.add_argument("--algorithms", metavar="WHICH", choices=ALGORITHMS, default="fast",
                        help="fast; or small: no Winograd, whose weights take more (default: %(default)s)")
    _add_rules(parser)


def _add_rules(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--rules", metavar="PRESET", default="dtd",
        help="rules of all layers: dtd (the method as published), or another one that `fastdtd rules` lists (default: "
        "%(default)s)")
    parser.add_argument(
        "--rule", metavar="LAYER=RULE", action="append", default=[], type=_rule,
        help="another rule than the preset's for a layer, for all that a pattern matches, or for a type such as "
        "type:dense; `fastdtd rules` lists them, with their parameters")


def _rules(options: argparse.Namespace) -> list[str | dict[str, str]]:
    return [str(options.rules), *({layer: rule} for layer, rule in options.rule)]


def _rule(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.+)=([^=()]*(?:\(.*\))?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no LAYER=RULE, as in 'conv1=w2' or 'conv*=epsilon(epsilon=0.25)'")
    return match[1], match[2]


def _layer_channels(text: str) -> tuple[str, list[int]]:
    match = re.fullmatch(r"(.+)=(\d{1,9}(?:,\d{1,9})*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no LAYER=CHANNELS, as in 'conv5=3,17'")
    return match[1], [int(number) for number in match[2].split(",")]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, as in 104,117,123") from None


def _count_or_all(text: str) -> int | str:
    return text if text == "all" else int(text)


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (text if "," in text else f"{text},{text}").split(",")
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; required: H,W in whole pixels, as in 227,227") from None


def _box(text: str) -> list[tuple[float, float]] | tuple[float, float]:
    try:
        if ":" not in text:
            low, high = _numbers(text)
            return low, high
        pairs = [part.split(":") for part in text.split(",")]
        return [(float(low), float(high)) for low, high in pairs]
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no box; required: LOW,HIGH as in -3,3 or LOW:HIGH,... as in -104:151,-117:138") from None


# ---- Commands --------------------------------------------------------------------------------------------------------


def _explain(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastdtd import analysis, model_file, report, results, runner, sources
    from fastdtd.explainer import Explainer, usable_processors
    from fastdtd.explanation import note_of_absorbed

    model = model_file.load(options.model)
    entries = sources.find(options.sources or sorted((Path(__file__).parent / "models").glob("*.png")),
                           options.labels or options.true_label)
    workers = usable_processors() if options.workers is None else options.workers
    # With many images each processor takes some; with few, all take one together.
    is_many = options.device == "cpu" and len(entries) >= 4 * workers
    explainer = Explainer(model, _rules(options), device=options.device, threads=1 if is_many else workers,
                          memory=options.memory, precision=options.precision,
                          max_multiply_adds=options.max_multiply_adds)
    books: dict[str, float] = defaultdict(float)
    flow: dict[str, float] = defaultdict(float)
    sizes = [0.0, 0.0]  # of what was explained, and of what layers absorbed of it
    width = min(40, max(len(entry.name) for entry in itertools.islice(entries, _LINES)))
    prints = len(entries) <= _LINES
    with tqdm(total=len(entries), unit="image", smoothing=0.1, file=sys.stderr,
              disable=None if len(entries) > 1 else True) as bar:
        def on_line(line: runner.Line) -> None:
            for sums, of_line in ((books, {"": line.relevance,
                                           **line.ledger}), (flow, {"": line.relevance, **line.flow})):
                for layer, amount in of_line.items():
                    sums[layer] += amount
            sizes[0] += abs(line.explained)
            sizes[1] += abs(line.absorbed)
            if not prints:
                return
            name = line.class_name if line.class_name == str(line.target) else f"{line.target} {line.class_name}"
            name = f"{name} {line.place}" if line.place else name
            absorbed = f", absorbed {line.absorbed:.6g}" if abs(line.absorbed) > 1e-5 * abs(line.score) else ""
            nothing = "" if line.explained or line.against else ", score not positive: nothing to decompose"
            less = f" against {line.against}" if line.against else ""
            if line.against or (line.place and line.explained not in (0, line.score)):  # some scores are negative
                less += f", explained {line.explained:.6g}"
            cut = f", through other channels {line.cut:.6g}" if options.through else ""
            bar.write(printable(
                f"{line.name:<{width}}  {name}  score {line.score:.6g}{less}, relevance "
                f"{line.relevance:.6g}{absorbed}{cut}{nothing}"), file=sys.stdout)

        def on_failed(count: int) -> None:
            bar.set_postfix_str(f"{count} failed", refresh=False)

        storage = results.Storage(options.store, not options.sum_channels, options.compress, options.keep)
        draw = None if options.draw == "all" else options.draw
        places = iter([options.out] if options.out else (Path(f"out-{i}" if i > 1 else "out") for i in count(1)))
        with _executor(options.dask, options.workers) as executor:
            while True:
                out = next(places)
                try:
                    summary = runner.run(
                        explainer, entries, out, _targets(options.target), options.outputs.split(","), options.batch,
                        on_line, bar.update, options.ledger, top=options.top, true_label=options.true_label,
                        workers=workers, draw=draw, storage=storage, draft=options.draft, shard=options.shard,
                        retry_failed=options.retry_failed, executor=executor, on_failed=on_failed,
                        against=_targets(options.against), through=dict(options.through) or None)
                    break
                except runner.AnotherRunError:
                    if options.out:
                        raise
    if summary.clipped:
        print(f"fastdtd: {summary.clipped}", file=sys.stderr)
    for _, reason in summary.failed[:_LINES]:
        print(printable(f"fastdtd: not explained: {reason}"), file=sys.stderr)
    if len(summary.failed) > _LINES:
        print(f"fastdtd: and {len(summary.failed) - _LINES:,} more, see {out / results.FAILED}",
              file=sys.stderr)
    for made, command in ((report.PAGE, "report"), (analysis.ANALYSIS, "analyze")):
        if summary.explained and (out / made).exists():
            print(printable(f"fastdtd: {out / made} was made before; `fastdtd {command} {out}` makes it anew"),
                  file=sys.stderr)
    if options.ledger:
        _print_books(books, flow)
    if options.stats:
        _print_stages(summary, workers)
    if not options.against and (note := note_of_absorbed(*sizes)):
        print(f"fastdtd: {note}; --ledger says which layers", file=sys.stderr)
    before = f", {summary.done_before} more were done before" if summary.done_before else ""
    failed = f", {len(summary.failed)} failed" if summary.failed else ""
    print(f"{summary.explained} explained{before}{failed}; see {out}/")
    return 1 if summary.failed else 0


@contextlib.contextmanager
def _executor(address: str | None, workers: int | None) -> Iterator[Any]:
    """An executor of Dask's cluster at an address, or of one of this machine; None where none is asked for."""
    if address is None:
        yield None
        return
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError:
        raise InputError("--dask needs the package distributed; required: pip install \"fastdtd[dask]\"") from None
    with contextlib.ExitStack() as stack:
        if address == "local":
            # Dask looks at what threads do every 10 ms, and returns freed memory at once: a fifth of the time.
            variables = dask.config.get("distributed.nanny.pre-spawn-environ")
            stack.enter_context(dask.config.set({
                "distributed.worker.profile.enabled": False,
                "distributed.nanny.pre-spawn-environ": {
                    **variables, "MALLOC_TRIM_THRESHOLD_": 1 << 30, "MALLOC_MMAP_THRESHOLD_": 1 << 25},
            }))
            cluster = stack.enter_context(LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None))
            client = stack.enter_context(Client(cluster))
        else:
            try:
                client = stack.enter_context(Client(address, timeout="10s"))
            except (OSError, ValueError) as error:
                raise InputError(f"no scheduler of Dask answers at {address!r} ({error}); required: its address, such "
                                 "as tcp://host:8786, or local") from None
        yield client.get_executor(pure=False, retries=3)


def _print_stages(summary: Any, workers: int) -> None:
    """What each stage takes of a thread, so that one sees what to add."""
    from fastdtd.shards import STAGES

    images = max(1, summary.explained)
    print(f"{'stage':<10}  {'ms an image':>12}  {'images a second':>16}  of {workers} threads")
    for stage in STAGES:
        each = summary.seconds[stage] / images
        threads = 1 if stage == "write" else workers
        print(f"{stage:<10}  {1000 * each:>12.2f}  {threads / each if each else math.inf:>16.1f}")
    print(f"{'all':<10}  {1000 * summary.elapsed / images:>12.2f}  {images / summary.elapsed:>16.1f}")


def _verify(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastdtd import results

    with tqdm(unit="shard", file=sys.stderr, disable=None) as bar:
        found = results.verify(options.out, bar.update)
    for trouble in found.troubles:
        print(printable(trouble))
    print(f"{found.shards} shards, {found.rows} explanations, {found.failed} images failed: "
          f"{f'{len(found.troubles)} troubles' if found.troubles else 'sound'}")
    return 1 if found.troubles else 0


def _analyze(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastdtd import analysis

    with contextlib.ExitStack() as stack:
        bars: dict[str, Any] = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = stack.enter_context(tqdm(total=total, desc=stage, file=sys.stderr, disable=None))
            bars[stage].update(done - bars[stage].n)

        made = analysis.analyze(options.out, options.by, on_progress)
    for name, reason in made.failed[:_LINES]:
        print(printable(f"fastdtd: gray in {analysis.INPUT}: {name}: {reason}"), file=sys.stderr)
    if len(made.failed) > _LINES:
        print(f"fastdtd: and {len(made.failed) - _LINES:,} more", file=sys.stderr)
    left_out = f", {made.left_out} left out" if made.left_out else ""
    print(f"{made.rows} heatmaps in {made.classes} classes{left_out}; see them with: virelay {made.project}")
    return 1 if made.failed else 0


def _report(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastdtd import report
    from fastdtd.explainer import usable_processors

    with tqdm(unit="image", file=sys.stderr, disable=None) as bar:
        def on_progress(count: int, total: int) -> None:
            bar.total = total
            bar.update(count)

        workers = usable_processors() if options.workers is None else options.workers
        page = report.write(options.out, options.images, workers, on_progress)
    print(f"open {page} in a browser")
    return 0


def _print_books(books: dict[str, float], flow: dict[str, float]) -> None:
    """Where the scores of all pictures went, from the scores on: what came to each layer, went on, and was absorbed; ""
    is the pixels.
    """
    total = sum(books.values())
    width = max(len(name) for name in [*books, "the pixels"])
    print(f"{'layer':<{width}}  {'came':>12}  {'went on':>12}  {'absorbed':>12}")
    for name in reversed(list(books)[1:]):
        print(f"{printable(name):<{width}}  {flow[name]:>12.6g}  {flow[name] - books[name]:>12.6g}  "
              f"{books[name]:>12.6g}  {books[name] / total if total else 0:>8.3%}")
    for name, amount in (("the pixels", books[""]), ("all", total)):
        print(f"{name:<{width}}  {amount:>12.6g}  {'':>12}  {'':>12}  {amount / total if total else 0:>8.3%}")


def _targets(texts: list[str]) -> Any:
    found = [_target(text) for text in texts]
    return found[0] if len(found) == 1 else found or None


def _target(text: str) -> Any:
    """A class's number or name; with where in its map: CLASS@max or CLASS@Y,X."""
    name, at, place = text.rpartition("@")
    if at and (found := re.fullmatch(r"(\d{1,9}),(\d{1,9})|max", place)):
        return _target(name), *(map(int, found.groups()) if found[1] else (place, ))
    return _number_or_name(text)


def _number_or_name(text: str) -> int | str:
    return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else text


def _evaluate(options: argparse.Namespace) -> int:
    import warnings

    from tqdm import tqdm

    from fastdtd import evaluation, model_file, sources
    from fastdtd.inputs import ExplanationWarning

    model = model_file.load(options.model)
    found = sources.find(options.sources or sorted((Path(__file__).parent / "models").glob("*.png")))
    pictures = [entry for entry in found if not entry.trouble]
    failed = [entry.trouble for entry in found if entry.trouble]
    if not pictures:
        raise InputError(failed[0])
    methods: Any = options.methods.split(",")
    if options.rule:
        name = ", ".join(["dtd", *(f"{layer}={rule}" for layer, rule in options.rule)])
        methods = {name: ["dtd", *({layer: rule} for layer, rule in options.rule)], **{one: one for one in methods}}
    out = evaluation.writable_folder(options.out)
    with (tqdm(total=len(pictures), unit="picture", file=sys.stderr, disable=None) as bar,
          warnings.catch_warnings(record=True) as told):
        warnings.simplefilter("always", ExplanationWarning)
        result = evaluation.evaluate(
            model, pictures, methods, options.order, options.steps, options.region, options.repeats,
            _targets([] if options.target is None else [options.target]), options.seed, bar.update,
            against=_targets(options.against), through=dict(options.through) or None, threads=options.threads,
            memory=options.memory, device=options.device)
    result.save(out)
    print(result)
    for text in dict.fromkeys(str(warning.message) for warning in told):
        print(printable(f"fastdtd: {text}"), file=sys.stderr)
    for reason in [*failed, *result.failed.values()]:
        print(printable(f"fastdtd: not evaluated: {reason}"), file=sys.stderr)
    print(f"{len(pictures) - len(result.failed)} evaluated"
          f"{f', {count} failed' if (count := len(failed) + len(result.failed)) else ''}; see {out}/")
    return 1 if failed or result.failed else 0


def _channels(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastdtd import channels, model_file, sources
    from fastdtd.evaluation import writable_folder
    from fastdtd.explainer import Explainer

    for name in ("channels", "pictures"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}; required: a whole number from 1")
    explainer = Explainer(model_file.load(options.model), _rules(options), device=options.device,
                          threads=options.threads, memory=options.memory)
    entries = sources.find(options.sources or sorted((Path(__file__).parent / "models").glob("*.png")))
    out = writable_folder(options.out)
    with tqdm(total=len(entries), unit="picture", file=sys.stderr, disable=None) as bar:
        found = channels.rank(explainer, entries, options.layer,
                              _targets([] if options.target is None else [options.target]), bar.update)
    found.save(out, explainer, options.channels, options.pictures)
    means = found.shares.mean(0, dtype=float)
    for channel in found.order[:options.channels].tolist():
        names = ", ".join(found.entries[i].name for i in found.top(channel, options.pictures))
        print(printable(f"channel {channel}  {means[channel]:.1%} on average  {names}"))
    for reason in found.failed.values():
        print(printable(f"fastdtd: not explained: {reason}"), file=sys.stderr)
    print(f"{len(found.entries)} explained"
          f"{f', {len(found.failed)} failed' if found.failed else ''}; see {out}/")
    return 1 if found.failed else 0


def _convert(options: argparse.Namespace) -> int:
    from fastdtd import model_file
    from fastdtd.importers import convert, opened

    def numbers(values: list[float]) -> Any:
        return values if len(values) > 1 else values[0]

    source = opened(options.source, options.weights)
    model = convert(source, options.weights, color=options.color, size=options.size, resize=options.resize,
                    mean=numbers(options.mean), std=numbers(options.std), scale=options.scale, box=options.box,
                    labels=options.labels, verify=options.verify, max_constants=options.max_constants,
                    output=options.output)
    if "verified" in model.provenance:
        print(f"{options.source}: the scores are those of {model.provenance['verified']}")
    model_file.save(model, options.model, options.dtype)
    print(f"{options.model}: {len(model.graph.layers)} layers, {_parameters(model.graph):,} parameters; `fastdtd show "
          f"{options.model}` lists them")
    return 0


def _show(options: argparse.Namespace) -> int:
    from fastdtd import model_file
    from fastdtd.cost import cost, decimal
    from fastdtd.rules import assign, input_domain

    model = model_file.load(options.model)
    graph, p = model.graph, model.preprocessing
    assignment = assign(graph, _rules(options))

    def size(name: str) -> str:
        return "x".join(map(str, graph.shapes[name][:1 if graph.shapes[name][1:] == (1, 1) else 3]))

    rows = [("layer", "type", "reads", "output", "parameters", "domain", "rule"),
            ("input", "", "", size("input"), "", "", "")]
    for layer in graph:
        count = sum(getattr(layer, field).size for field in layer.arrays if getattr(layer, field) is not None)
        rule = assignment.rules.get(layer.name)
        told = "held constant" if layer.name in assignment.held else str(rule.rule) if rule else ""
        rows.append(
            (layer.name, type(layer).__name__, ", ".join(layer.inputs), size(layer.name), f"{count:,}" if count else "",
             str(input_domain(graph, layer)) if rule else "", told))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(printable("  ".join(f"{cell:>{w}}" if i == 4 else f"{cell:<{w}}"
                                  for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()))
    print()
    print(f"input     {size('input')}, "
          + (f"{p.color}, {p.resize}, (pixel * {p.scale:g} - {_text(p.mean)}) / {_text(p.std)}" if p.
             color else "no picture"))
    print("box       " + ("none" if graph.box is None else f"{_text(graph.box[0])} to {_text(graph.box[1])}"))
    print(f"classes   {len(model.classes) or 'unnamed'}")
    takes = cost(graph)
    print(f"weights   {_parameters(graph):,} parameters, {decimal(takes.weight_bytes)}B")
    print(f"cost      {decimal(takes.forward).strip()} multiply-adds forward and {decimal(takes.backward).strip()} "
          f"backward, {decimal(takes.activation_bytes)}B of activations, for one picture")
    for key, value in model.provenance.items():
        print(printable(f"{key:<9} {value}"))
    return 0


def _list_rules(_: argparse.Namespace) -> int:
    from fastdtd import rules

    tables = {
        "Presets (--rules):": {name: preset.text for name, preset in rules.PRESETS.items()},
        "Rules of convolutions, dense layers, average pools and additions (--rule); they redistribute relevance": rules.
        LINEAR_RULES, "Of max-pools:": rules.POOL_RULES, "Of local response normalisation:": rules.NORM_RULES,
        "Of layer, group, instance and RMS norm, a linear layer with its deviation held constant:":
        rules.GROUP_NORM_RULES, "Of products with a gate:": rules.PRODUCT_RULES,
        "What a rule's bias can be:": rules.BIASES,
    }
    width = max(len(name) for table in tables.values() for name in table)
    for title, table in tables.items():
        print(title)
        for name, text in table.items():
            print(f"  {name:<{width}}  {text}")
        print()
    print("Parameters and their defaults:")
    for name, parameters in rules.PARAMETERS.items():
        print(f"  {name}({', '.join(f'{key}={value}' for key, value in parameters.items())})")
    return 0


def _embed(options: argparse.Namespace) -> int:
    from fastdtd import model_file
    from fastdtd.embedding import embed

    model = model_file.load(options.model)
    name = options.name or re.sub(r"\W|^(?=\d)", "_", Path(options.model).stem, flags=re.ASCII)
    made = embed(model, options.out, _rules(options), options.target, options.weights, options.algorithms, name,
                 options.device_cpu)
    for path in (made.header, made.object, made.static, made.shared, made.weights):
        if path:
            print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"for {made.target}; a call needs {made.workspace_bytes:,} bytes of workspace and {made.weights_bytes:,} of "
          "weights")
    if not made.is_tested:
        print(printable(f"fastdtd: nothing was ever run on {made.target}; try what was written"), file=sys.stderr)
    for line in made.missing:
        print(printable(f"fastdtd: {line}"), file=sys.stderr)
    return 0


def _warmup(options: argparse.Namespace) -> int:
    from fastdtd.warmup import warm_up

    print(f"all kernels are compiled and kept in {warm_up()}")
    return 0


def _text(values: Any) -> str:
    flat = sorted(set(values.ravel().tolist())) if values.size > 4 else values.ravel().tolist()
    if len(flat) > 4:
        return f"[{flat[0]:g}..{flat[-1]:g}]"
    return f"{flat[0]:g}" if len(set(flat)) == 1 else "[" + ", ".join(f"{v:g}" for v in flat) + "]"


def _parameters(graph: Any) -> int:
    return sum(
        getattr(layer, field).size for layer in graph for field in layer.arrays if getattr(layer, field) is not None)
