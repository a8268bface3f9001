"""Embedded libraries: the explainer's bits, the C interface, what it refuses, memory, threads, other processors."""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from fastdtd.kernels.cpu import program

import fastdtd
from fastdtd import cli, embedded, model_file, warmup
from fastdtd.embedding import linking, packing, targets
from fastdtd.graph import Conv2d, Dense, Flatten, GlobalAveragePool, Graph, ReLU
from fastdtd.model import Model, Preprocessing

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("embedding")]  # all compile into the same folder
HERE, EXAMPLES = Path(__file__).parent, Path(__file__).parents[1] / "examples"
CC = shutil.which("cc")
needs_cc = pytest.mark.skipif(not CC or sys.platform != "linux", reason="no C compiler")


def run(*command, **options):
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def small_model(color="rgb", resize="stretch", **preprocessing):
    """Every kind of layer that a processor has kernels of its own for, in a small network that takes pictures."""
    graph = warmup._network()
    return Model(Graph(graph.layers, graph.input_shape, graph.box),
                 Preprocessing(color, resize, **preprocessing), classes=tuple(f"class {i}" for i in range(10)))


@pytest.fixture(scope="module")
def squeezenet():
    return fastdtd.load("squeezenet1_1")


@pytest.fixture(scope="module")
def pictures(squeezenet):
    return np.stack([squeezenet.preprocess(model_file.MODELS / f"{name}.png") for name in ("coffee", "chelsea")])


@pytest.fixture(scope="module")
def made(squeezenet, tmp_path_factory):
    """SqueezeNet for this very processor, weights in a file."""
    return fastdtd.embed(squeezenet, tmp_path_factory.mktemp("made"), weights="file", name="net", device_cpu=True)


@pytest.fixture(scope="module")
def network(made):
    return embedded.load(made.shared)


# ---- The same bits ---------------------------------------------------------------------------------------------------


def test_relevance_is_the_explainers(squeezenet, network, pictures):
    explainer = fastdtd.Explainer(squeezenet, threads=1)
    assert network.input_shape == squeezenet.graph.input_shape
    for target in (None, 281):
        expected = explainer(pictures, target)
        for i, picture in enumerate(pictures):
            e = network.explain(picture, target)
            assert e.target == expected.target[i]
            assert e.output.tobytes() == expected.output[i].tobytes() == network.predict(picture).tobytes()
            assert e.relevance.tobytes() == expected.relevance[i].tobytes()
            assert e.absorbed == np.float32(expected.absorbed[i])
            assert network.class_name(e.target) == squeezenet.class_name(e.target)


def test_a_difference_is_what_an_output_is_held_against(squeezenet, network, pictures):
    """As docs/howto-embed.md has it."""
    explainer = fastdtd.Explainer(squeezenet, threads=1)
    for picture in pictures:
        runner_up = int(np.argsort(-network.predict(picture))[1])
        expected = explainer(picture, against=runner_up)
        own, other = network.explain(picture), network.explain(picture, runner_up)
        size = max(np.linalg.norm(own.relevance), np.linalg.norm(other.relevance))
        assert np.linalg.norm(own.relevance - other.relevance - expected.relevance[0]) <= 1e-5 * size
        assert own.output[own.target] - own.output[runner_up] == pytest.approx(expected.explained[0], rel=1e-5)
        assert own.absorbed - other.absorbed == pytest.approx(expected.absorbed[0], abs=1e-4)


@pytest.mark.parametrize("rules", [
    "dtd", "gradient", "gradient*input", "sensitivity",
    {"type:conv2d": "z+(bias=absorbed, epsilon=1e-6)", "type:dense": "epsilon", "type:multiply": "half",
     "type:group_norm": "gamma"},
    {"type:conv2d": "gamma(gamma=0.3)", "type:dense": "epsilon"}, {"type:conv2d": "alpha-beta(alpha=2, beta=1)"},
    {"type:conv2d": "z+(bias=absorbed)", "normed again": "taylor", "proportional": "proportional"},
], ids=str)
def test_all_layers_and_rules(rules, tmp_path):
    model = small_model()
    *layers, scores = model.graph
    weight = scores.weight * np.where(np.arange(len(scores.weight)) == 1, -1, 1)[:, None]  # a class of negative score
    turned = dataclasses.replace(scores, weight=weight)
    model = dataclasses.replace(model, graph=Graph((*layers, turned), model.graph.input_shape, model.graph.box))
    made = fastdtd.embed(model, tmp_path, rules, weights="file", name="net", device_cpu=True)
    network = embedded.load(made.shared)
    explainer = fastdtd.Explainer(model, rules, threads=1)
    images = np.random.default_rng(0).random((2, *model.graph.input_shape), np.float32)
    targets = [3, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastdtd.ExplanationWarning)
        expected = explainer(images, targets)
    assert expected.output[1, 1] < 0
    for i, image in enumerate(images):
        e = network.explain(image, targets[i])
        assert e.output.tobytes() == expected.output[i].tobytes()
        assert e.relevance.tobytes() == expected.relevance[i].tobytes()
        assert e.absorbed == pytest.approx(expected.absorbed[i], rel=1e-6)


@pytest.mark.parametrize("preprocessing", [
    {"color": "rgb", "resize": "stretch"}, {"color": "bgr", "resize": "crop", "mean": (1, 20, 300), "std": (1, 2, 3)},
    {"color": "rgb", "resize": "crop", "scale": 1 / 255, "mean": np.random.default_rng(0).random((3, 64, 64))},
    {"color": "gray", "resize": "stretch", "mean": 7}], ids=["stretch", "crop", "planes", "gray"])
def test_preprocessing_is_the_models(preprocessing, tmp_path):
    channels = 1 if preprocessing["color"] == "gray" else 3
    layers = [GlobalAveragePool("mean", ("input",)), Dense("scores", ("mean",), np.ones((2, channels)))]
    shape = (channels, 33, 48)
    if np.ndim(preprocessing.get("mean")) == 3:
        preprocessing = {**preprocessing, "mean": preprocessing["mean"][:, :33, :48]}
    model = Model(Graph(layers, shape), Preprocessing(**preprocessing))
    network = embedded.load(fastdtd.embed(model, tmp_path, name="net", device_cpu=True).shared)
    rng = np.random.default_rng(1)
    for size in ((33, 48), (1, 1), (1, 1000), (1000, 1), (66, 96), (67, 95), (20, 500), (300, 400), (32, 49), (5, 7)):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        assert network.preprocess(pixels).tobytes() == model.preprocess(pixels).tobytes(), size


def test_threads_do_not_disturb_each_other(network, pictures):
    expected = [network.explain(picture).relevance.tobytes() for picture in pictures]
    wrong = []

    def work(number):
        for i in range(6):
            which = (number + i) % len(pictures)
            if network.explain(pictures[which]).relevance.tobytes() != expected[which]:
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- Weights ---------------------------------------------------------------------------------------------------------


def test_compact_weights_are_unpacked_to_the_same_bytes(squeezenet, made, tmp_path):
    compact = fastdtd.embed(squeezenet, tmp_path, weights="compact", name="net", device_cpu=True)
    parameters = sum(layer.weight.nbytes for layer in squeezenet.graph if isinstance(layer, (Conv2d, Dense)))
    assert compact.weights.stat().st_size < 1.15 * parameters < made.weights.stat().st_size
    assert hashlib.sha256(embedded.load(compact.shared)._mapped.tobytes()).digest() == hashlib.sha256(
        made.weights.read_bytes()).digest()


def test_weights_in_half_precision_are_those_of_a_rounded_network(tmp_path):
    model = small_model()
    made = fastdtd.embed(model, tmp_path, weights="compact16", name="net", device_cpu=True)
    rounded = [dataclasses.replace(layer, weight=layer.weight.astype(np.float16)) if isinstance(layer, (Conv2d, Dense))
               else layer for layer in model.graph]
    same = Model(Graph(rounded, model.graph.input_shape, model.graph.box), model.preprocessing)
    image = np.random.default_rng(0).random(model.graph.input_shape, np.float32)
    e, expected = embedded.load(made.shared).explain(image), fastdtd.Explainer(same, threads=1)(image)
    assert e.relevance.tobytes() == expected.relevance[0].tobytes()


def test_half_precision_holds_every_number():
    """float16's bits, as the library reads them, against NumPy's."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)]
    read = [program._weight(numbers.ctypes.data, i, True) for i in range(len(numbers))]
    assert np.array_equal(np.array(read, np.float32).view(np.int32), numbers.astype(np.float32).view(np.int32))


@pytest.mark.parametrize(("shape", "order"), [((4,), (0,)), ((2, 3, 4), (2, 0, 1)), ((5, 4, 3, 2), (3, 1, 0, 2)),
                                              ((1, 7, 1, 2), (3, 2, 1, 0)), ((6, 6), (1, 0))])
def test_loops_run_through_any_order_of_axes(shape, order):
    index = np.arange(np.prod(shape)).reshape(shape).transpose(order).ravel()
    loops = packing._loops(index)
    run_through = np.array([index[0]])
    for size, stride in loops[::-1]:
        run_through = (run_through[:, None] + stride * np.arange(size)).ravel()
    assert np.array_equal(run_through, index)
    assert len(loops) <= len(shape)
    assert packing._loops(np.array([3, 1, 4, 1, 5])) is None


def test_other_weights_are_refused(made, network, tmp_path):
    content = bytearray(made.weights.read_bytes())

    def load(changed):
        path = tmp_path / "changed.weights"
        path.write_bytes(changed)
        embedded.load(made.shared, path)

    for changed, code in ((b"XastdtdW" + content[8:], program.NO_WEIGHTS),
                          (content[:8] + b"\x02" + content[9:], program.OTHER_VERSION),
                          (content[:16] + bytes([content[16] ^ 1]) + content[17:], program.WRONG_SIZE),
                          (content[:30] + bytes([content[30] ^ 1]) + content[31:], program.OTHER_NETWORK)):
        with pytest.raises(embedded.EmbeddedError) as error:
            load(changed)
        assert error.value.code == code
    for changed in (b"", content[:-1], content + b"\0"):
        with pytest.raises(fastdtd.FastDTDError, match=f"required: the network's weights, {len(content)} bytes"):
            load(changed)
    with pytest.raises(embedded.EmbeddedError, match="cannot be read"):
        embedded.load(made.shared, tmp_path / "no such file")


# ---- What is refused at run time -------------------------------------------------------------------------------------


def test_codes(network):
    functions, size = network._functions, int(np.prod(network.input_shape))
    image, output = np.zeros(size + 16, np.float32), np.full(network.outputs + 16, 7, np.float32)
    relevance, absorbed = np.full(size + 16, 7, np.float32), np.zeros(1, np.float32)
    at = {"weights": network._weights, "input": image.ctypes.data, "target": -1, "output": output.ctypes.data,
          "relevance": relevance.ctypes.data, "absorbed": absorbed.ctypes.data, "workspace": network._workspace()}

    def explain(**changes):
        return functions["explain"](*(at | changes).values())

    for name in ("weights", "input", "relevance", "workspace"):
        assert explain(**{name: None}) == program.NULL, name
    for name in ("input", "output", "relevance", "absorbed"):
        assert explain(**{name: at[name] + 2}) == program.MISALIGNED, name
    for name in ("weights", "workspace"):
        assert explain(**{name: at[name] + 32}) == program.MISALIGNED, name
    for target in (-2, network.outputs, 2**31 - 1, -2**31):
        assert explain(target=target) == program.BAD_TARGET
    assert (output == 7).all()
    assert (relevance == 7).all()
    for value in (np.nan, np.inf, -np.inf):
        image[size - 1] = value
        assert explain() == functions["predict"](at["weights"], at["input"], at["output"], at["workspace"]) \
            == program.NOT_FINITE
    image[size - 1] = 0
    assert explain(output=None, absorbed=None) == program.OK
    check = functions["check_workspace"]
    assert check(at["workspace"], network.workspace_bytes) == program.OK
    assert check(at["workspace"], network.workspace_bytes - 1) == program.WRONG_SIZE
    assert check(None, network.workspace_bytes) == program.NULL
    check = functions["check_weights"]
    wanted = functions["weights_bytes"]()
    for size, code in ((wanted, program.OK), (wanted + 1, program.WRONG_SIZE), (8, program.WRONG_SIZE)):
        assert check(at["weights"], size) == code
    pixels = np.zeros((4, 4, 3), np.uint8)
    for height, width, row in ((0, 4, 12), (4, 0, 12), (-1, 4, 12), (4, 4, 11), (4, 4, -12), (65537, 1, 3)):
        assert functions["preprocess_rgb"](pixels.ctypes.data, height, width, row, at["input"]) == program.BAD_PICTURE
    for code in (*program.MESSAGES, 1, -99, -2**31):
        assert functions["error"](code).decode() == program.MESSAGES.get(code, "no such code")
    for index in (-1, network.outputs, -2**31):
        assert functions["class_name"](index) is None


def test_inputs_of_other_kinds_are_refused(network, pictures):
    for image in (pictures, pictures[0].ravel(), pictures[0] + 1j, "cat"):
        with pytest.raises(embedded.EmbeddedError, match="required: numbers"):
            network.explain(image)
    for target in (-1, network.outputs):
        with pytest.raises(embedded.EmbeddedError, match="required: a whole number from 0"):
            network.explain(pictures[0], target)
    for pixels in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(embedded.EmbeddedError, match=r"required: uint8 \(H, W, 3\)"):
            network.preprocess(pixels)


def test_scores_beyond_float32(tmp_path):
    layers = (Dense("scores", ("flat",), np.full((2, 4), 1e38)), Flatten("flat", ("input",)))
    model = Model(Graph(layers, (4, 1, 1), (0.0, 1e4)), Preprocessing(None))
    network = embedded.load(fastdtd.embed(model, tmp_path, device_cpu=True).shared)
    with pytest.raises(embedded.EmbeddedError, match="beyond float32"):
        network.explain(np.ones((4, 1, 1)) * 1e4)
    assert network.class_name(1) == "1"


# ---- Compilers and other languages -----------------------------------------------------------------------------------


@needs_cc
def test_nothing_is_left_to_link(made):
    assert run("nm", "-u", made.object) == ""
    exported = {line.split()[-1] for line in run("nm", "-g", "--defined-only", made.object).splitlines() if line}
    assert {name.removeprefix("net_") for name in exported} == set(embedded._FUNCTIONS) - {"unpack", "compact_bytes"}
    assert "statically linked" in subprocess.run(["ldd", made.shared], capture_output=True, text=True,
                                                 check=False).stdout


@needs_cc
@pytest.mark.parametrize("language", [("cc", "-std=c99", "c"), ("c++", "-std=c++11", "c++")], ids=["c", "c++"])
def test_header_is_valid(language, made, tmp_path):
    compiler, standard, kind = language
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    (tmp_path / "host").write_text(f'#include "{made.header}"\n#include "{made.header}"\n'
                                   "int main(void) { return (int)net_abi_version() - NET_ABI_VERSION; }\n")
    run(compiler, "-x", kind, standard, "-Wall", "-Wextra", "-pedantic", "-Werror", "-o", tmp_path / "out",
        tmp_path / "host", "-x", "none", made.static)
    run(tmp_path / "out")


@needs_cc
@pytest.mark.parametrize("weights", ["file", "compact"])
@pytest.mark.parametrize("how", ["guards", "sanitizers", "valgrind"])
def test_memory(how, weights, tmp_path):
    """Guard pages on both sides of every buffer; the host under sanitizers; valgrind."""
    if how == "valgrind" and not shutil.which("valgrind"):
        pytest.skip("no valgrind")
    model = small_model()
    target = {"target": "x86-64-v3"} if os.uname().machine == "x86_64" else {"device_cpu": True}  # valgrind knows AVX2
    made = fastdtd.embed(model, tmp_path, weights=weights, name="net", **target)
    image = np.random.default_rng(0).random(model.graph.input_shape, np.float32)
    (tmp_path / "input.f32").write_bytes(image.tobytes())
    flags = ["-g", "-fsanitize=address,undefined"] if how == "sanitizers" else ["-g"]
    host = tmp_path / "guarded"
    run("cc", "-std=c99", "-O1", *flags, f"-I{tmp_path}", HERE / "embedding" / "guarded.c", made.static, "-o", host)
    prefix = ["valgrind", "-q", "--error-exitcode=9"] if how == "valgrind" else []
    run(*prefix, host, made.weights, tmp_path / "input.f32", tmp_path / "relevance.f32")
    relevance = np.fromfile(tmp_path / "relevance.f32", np.float32)
    expected = embedded.load(made.shared).explain(image).relevance
    assert relevance.tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def for_examples(squeezenet, tmp_path_factory):
    """For what examples are compiled with: weights inside, and the input of a photograph."""
    folder = tmp_path_factory.mktemp("lib")
    fastdtd.embed(squeezenet, folder, name="net")
    return folder


@needs_cc
def test_c_example(for_examples, tmp_path):
    from PIL import Image
    Image.open(model_file.MODELS / "coffee.png").convert("RGB").save(tmp_path / "coffee.ppm")
    run("cc", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{for_examples}", EXAMPLES / "embed" / "explain.c",
        for_examples / "libnet.a", "-o", tmp_path / "explain")
    said = run(tmp_path / "explain", tmp_path / "coffee.ppm", tmp_path / "heatmap.ppm")
    assert said.startswith("espresso, score 31.1063")
    heatmap = np.asarray(Image.open(tmp_path / "heatmap.ppm"))
    model = fastdtd.load("squeezenet1_1")
    expected = fastdtd.Explainer(model)(model_file.MODELS / "coffee.png").relevance[0].sum(0)
    pale = 255 - (255 * np.maximum(expected, 0) / expected.max()).astype(int)
    assert heatmap.shape == (227, 227, 3)
    assert np.abs(heatmap[..., 1].astype(int) - pale).max() <= 1
    assert (heatmap[..., 0] == 255).all()
    for damaged in (b"", b"P6 2 2 255\n123", b"P6 -1 2 255\n", b"P5 1 1 255\n0"):
        (tmp_path / "damaged.ppm").write_bytes(damaged)
        done = subprocess.run([tmp_path / "explain", tmp_path / "damaged.ppm", tmp_path / "out.ppm"],
                              capture_output=True, check=False)
        assert done.returncode == 1


COMMANDS = {
    "explain.cpp": ["c++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-I{lib}", "{source}", "{lib}/libnet.a",
                    "-pthread", "-o", "{out}"],
    "explain.rs": ["rustc", "--edition", "2021", "-O", "{source}", "-L", "{lib}", "-l", "static=net", "-o", "{out}"],
    "explain.go": ["go", "build", "-o", "{out}", "{source}"],
}


@needs_cc
@pytest.mark.parametrize("example", COMMANDS)
def test_examples_in_other_languages(example, squeezenet, pictures, for_examples, made, tmp_path):
    command = COMMANDS[example]
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]}")
    lib, inputs, arguments = for_examples, [], []
    for i, picture in enumerate(pictures):
        inputs.append(tmp_path / f"{i}.f32")
        inputs[-1].write_bytes(picture.tobytes())
    if example == "explain.cpp":
        lib, arguments = made.header.parent, [made.weights]
    names = {"lib": lib, "source": EXAMPLES / "embed" / example, "out": tmp_path / "explain"}
    env = os.environ | {"CGO_CFLAGS": f"-I{lib}", "CGO_LDFLAGS": f"{lib}/libnet.a", "GOFLAGS": "-mod=mod",
                        "GOCACHE": str(tmp_path / "go")}
    run(*(word.format(**names) for word in command), env=env, cwd=tmp_path)
    expected = fastdtd.Explainer(squeezenet)(pictures)
    taken = inputs if example == "explain.cpp" else inputs[:1]
    lines = run(tmp_path / "explain", *arguments, *taken).splitlines()
    assert len(lines) == len(taken)
    for i, line in enumerate(lines):
        score = expected.output[i, expected.target[i]]
        assert f"score {score:.4f}" in line
        assert f"relevance {expected.relevance[i].sum(dtype=np.float64):.4f}, absorbed 0.0000" in line
        assert f"class {expected.target[i]}" in line or squeezenet.class_name(int(expected.target[i])) in line


def test_runtime_alone(made, pictures, tmp_path):
    """The one file, where nothing else of fastdtd is."""
    shutil.copy(embedded.__file__, tmp_path)
    np.save(tmp_path / "picture.npy", pictures[0])
    code = ("import sys, numpy, embedded\n"
            f"network = embedded.load({str(made.shared)!r})\n"
            "e = network.explain(numpy.load('picture.npy'))\n"
            "print(network.class_name(e.target), *{'numba', 'fastdtd', 'h5py', 'PIL'} & set(sys.modules))\n"
            "try: embedded.load('nothing.so')\n"
            "except embedded.EmbeddedError as error: print(error.code)\n")
    assert run(sys.executable, "-c", code, cwd=tmp_path).splitlines() == ["espresso", "0"]


def test_files_that_are_no_such_library(tmp_path, made):
    (tmp_path / "libnet.so").write_bytes(b"no library")
    with pytest.raises(embedded.EmbeddedError, match="cannot be loaded"):
        embedded.load(tmp_path / "libnet.so")
    with pytest.raises(embedded.EmbeddedError, match="has no function other_abi_version"):
        embedded.load(made.shared, name="other")


# ---- Other processors ------------------------------------------------------------------------------------------------


EXPLAIN = """
import sys, numpy as np, fastdtd
from fastdtd import warmup
from test_embedding import small_model
image = np.fromfile(sys.argv[1], np.float32)
model = small_model()
e = fastdtd.Explainer(model, threads=1)(image.reshape(model.graph.input_shape))
e.relevance.tofile(sys.argv[2])
"""
# What Python computes with on this processor to get another one's bits: lanes, and whether multiply-adds are fused.
AS = {"aarch64": {"FASTDTD_VECTORS": "4x32", "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+avx,+fma"},
      "wasm32": {"FASTDTD_VECTORS": "4x16", "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
      "x86-64-v2": {"FASTDTD_VECTORS": "4x16", "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
      "x86-64-v3": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"}}


def expected_relevance(target, tmp_path):
    run(sys.executable, "-c", EXPLAIN, tmp_path / "input.f32", tmp_path / "expected.f32", cwd=HERE,
        env=os.environ | AS[target])
    return np.fromfile(tmp_path / "expected.f32", np.float32)


@pytest.fixture
def image(tmp_path):
    image = np.random.default_rng(0).random(small_model().graph.input_shape, np.float32)
    image.tofile(tmp_path / "input.f32")
    return image


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="for x86-64")
@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3"])
def test_levels_of_x86(target, image, tmp_path):
    made = fastdtd.embed(small_model(), tmp_path, target=target, name="net")
    assert made.target == target
    assert embedded.load(made.shared).explain(image).relevance.tobytes() == expected_relevance(
        target, tmp_path).tobytes()


HOST_JS = """
const fs = require("fs"), [library, weights, input, output] = process.argv.slice(2);
WebAssembly.instantiate(fs.readFileSync(library)).then(({ instance: { exports: net } }) => {
  let top = Number(net.__heap_base.value);
  const take = (bytes) => {
    const at = Math.ceil(top / 64) * 64;
    top = at + bytes;
    const missing = top - net.memory.buffer.byteLength;
    if (missing > 0) net.memory.grow(Math.ceil(missing / 65536));
    return at;
  };
  const put = (content) => {
    const at = take(content.length);
    new Uint8Array(net.memory.buffer, at, content.length).set(content);
    return at;
  };
  const given = fs.readFileSync(input), file = fs.readFileSync(weights);
  const image = put(given), workspace = take(net.net_workspace_bytes()), relevance = take(given.length);
  const packed = take(net.net_weights_bytes()), compact = put(file);
  let code = net.net_unpack(compact, file.length, packed, workspace);
  if (code === 0) code = net.net_explain(packed, image, -1, 0, relevance, 0, workspace);
  if (code !== 0) throw new Error("code " + code);
  fs.writeFileSync(output, new Uint8Array(net.memory.buffer, relevance, given.length));
});
"""


def test_webassembly(image, tmp_path):
    made = fastdtd.embed(small_model(), tmp_path, target="wasm32", weights="compact", name="net")
    if made.shared is None or not shutil.which("node"):
        pytest.skip(f"no linker for WebAssembly, or no node: {made.missing}")
    assert made.shared.name == "net.wasm"
    (tmp_path / "host.cjs").write_text(HOST_JS)
    run("node", tmp_path / "host.cjs", made.shared, made.weights, tmp_path / "input.f32", tmp_path / "relevance.f32")
    assert (tmp_path / "relevance.f32").read_bytes() == expected_relevance("wasm32", tmp_path).tobytes()


def test_page(squeezenet, tmp_path, browser):
    """A picture is explained in a browser, without a server that computes; its other classes, too."""
    for file in (EXAMPLES / "web").iterdir():
        shutil.copy(file, tmp_path)
    made = fastdtd.embed(squeezenet, tmp_path, target="wasm32", weights="compact16", name="net")
    if made.shared is None:
        pytest.skip(f"no linker for WebAssembly: {made.missing}")
    told = []
    with serving(tmp_path) as address:
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.goto(address)
        page.wait_for_function("document.getElementById('status').textContent === 'Ready.'", timeout=20_000)
        page.set_input_files("#file", model_file.MODELS / "coffee.png")
        page.wait_for_function("document.querySelectorAll('#scores tr').length === 5", timeout=20_000)
        said = page.text_content("#status")
        assert re.match(r"espresso: score 31\.\d\d, sum of relevance 31\.\d\d, explained in \d+ ms", said), said
        colours = page.evaluate("""() => {
            const canvas = document.getElementById("heatmap");
            return [canvas.width, canvas.height, ...canvas.getContext("2d").getImageData(0, 0, 227, 227).data];
        }""")
        expected = fastdtd.Explainer(squeezenet)(model_file.MODELS / "coffee.png").relevance[0].sum(0)
        pale = 255 - np.maximum(255 * expected / expected.max(), 0)
        green = np.array(colours[2:]).reshape(227, 227, 4)[..., 1]
        assert colours[:2] == [227, 227]
        assert np.abs(green - pale).mean() < 1  # weights are rounded to 11 bits
        page.click("#scores tr:nth-child(2) button")
        page.wait_for_function(f"document.getElementById('status').textContent !== {said!r}")
        assert not page.text_content("#status").startswith("espresso")
        page.set_input_files("#file", EXAMPLES / "web" / "explain.js")
        page.wait_for_function("document.getElementById('status').textContent.startsWith('This cannot be explained')")
        page.close()
    assert not told


@contextlib.contextmanager
def serving(folder):
    """The address of a server of a folder's files."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def test_aarch64(image, tmp_path):
    made = fastdtd.embed(small_model(), tmp_path, target="aarch64", weights="file", name="net")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    compiler = pytest.importorskip("ziglang", reason="no compiler for AArch64") and [
        sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    host = tmp_path / "guarded"
    run(*compiler, "-O1", f"-I{tmp_path}", HERE / "embedding" / "guarded.c", made.object, "-o", host)
    if not emulator:
        pytest.skip("no qemu-aarch64 to run it")
    run(emulator, host, made.weights, tmp_path / "input.f32", tmp_path / "relevance.f32")
    assert (tmp_path / "relevance.f32").read_bytes() == expected_relevance("aarch64", tmp_path).tobytes()


def test_any_triple_is_emitted(tmp_path):
    layers = [GlobalAveragePool("mean", ("input",)), Dense("scores", ("mean",), np.ones((2, 3)))]
    made = fastdtd.embed(Model(Graph(layers, (3, 8, 8))), tmp_path, target="riscv64-unknown-linux-gnu:generic-rv64:+d")
    assert made.object.read_bytes()[:4] == b"\x7fELF"
    assert not made.is_tested
    assert all(targets.find_target(name).is_tested for name in (None, *targets.TARGETS))


# ---- What is refused when it is made ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"target": "pdp11"}, "target 'pdp11' is unknown"), ({"target": "no-such-triple"}, "is unknown"),
    ({"target": "x86_64-unknown-linux-gnu", "device_cpu": True}, "one or the other"),
    ({"target": "s390x-unknown-linux-gnu"}, "most significant byte first"),
    ({"weights": "outside"}, "weights is 'outside'; required: 'embedded' or"),
    ({"algorithms": "slow"}, "algorithms is"),
    ({"name": "2net"}, "name is '2net'"), ({"name": "net-1"}, "name is"), ({"name": "int"}, "name is"),
    ({"name": ""}, "name is"), ({"name": "n" * 65}, "name is"), ({"rules": "none"}, "rules 'none' is unknown"),
], ids=str)
def test_options_that_there_are_not(options, message, squeezenet, tmp_path):
    with pytest.raises(fastdtd.FastDTDError, match=message):
        fastdtd.embed(squeezenet, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_direction_that_calls_a_library_is_named(tmp_path):
    layers = (Dense("hidden", ("flat",), np.ones((3, 4))), ReLU("relu", ("hidden",)),
              Dense("scores", ("relu",), np.ones((2, 3))), Flatten("flat", ("input",)))
    model = Model(Graph(layers, (4, 1, 1), (0.0, 1.0)), Preprocessing(None))
    with pytest.raises(fastdtd.InputError, match=r"layer scores calls .*exp.*required: rules of arithmetic"):
        fastdtd.embed(model, tmp_path, {"scores": fastdtd.search_direction(_exponential)})
    with pytest.raises(fastdtd.RuleError, match="a function that another process can import"):
        fastdtd.embed(model, tmp_path, {"scores": fastdtd.search_direction(lambda a, w: a * w)})
    made = fastdtd.embed(model, tmp_path, {"scores": fastdtd.search_direction(_product)}, device_cpu=True)
    image = np.float32([0.2, 0.5, 0.1, 0.9]).reshape(4, 1, 1)
    expected = fastdtd.Explainer(model, {"scores": fastdtd.search_direction(_product)}, threads=1)(image)
    assert embedded.load(made.shared).explain(image).relevance.tobytes() == expected.relevance.tobytes()


def _exponential(a, w):
    return np.exp(a) * w


def _product(a, w):
    return a * w


def test_without_a_linker_the_rest_is_written(tmp_path, monkeypatch, capsys):
    layers = [GlobalAveragePool("mean", ("input",)), Dense("scores", ("mean",), np.ones((2, 3)))]
    path = tmp_path / "net.h5"
    fastdtd.save(Model(Graph(layers, (3, 8, 8))), path)
    monkeypatch.setattr(linking, "_linkers", lambda target: iter(()))
    assert cli.main(["embed", str(path), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"net.h", "net.o", "libnet.a"}
    assert "no shared library was written: there is no linker for" in said.err
    assert "pip install" in said.err


def test_a_folder_that_cannot_be_written_to(squeezenet, tmp_path):
    (tmp_path / "file").write_text("")
    layers = [GlobalAveragePool("mean", ("input",)), Dense("scores", ("mean",), np.ones((2, 3)))]
    with pytest.raises(fastdtd.OutputError, match="cannot be written to"):
        fastdtd.embed(Model(Graph(layers, (3, 8, 8))), tmp_path / "file" / "out")


def test_the_same_library_has_the_same_bytes(tmp_path):
    layers = [GlobalAveragePool("mean", ("input",)), Dense("scores", ("mean",), np.ones((2, 3)))]
    model = Model(Graph(layers, (3, 8, 8)))
    first, second = (fastdtd.embed(model, tmp_path / name, weights="file") for name in ("a", "b"))
    for file in ("header", "object", "static", "shared", "weights"):
        assert getattr(first, file).read_bytes() == getattr(second, file).read_bytes(), file


@needs_cc
@pytest.mark.parametrize("name", ["net", "a_name_longer_than_sixteen"])
def test_static_libraries_have_an_index(name, tmp_path):
    layers = [GlobalAveragePool("mean", ("input",)), Dense("scores", ("mean",), np.ones((2, 3)))]
    made = fastdtd.embed(Model(Graph(layers, (3, 8, 8))), tmp_path, name=name)
    assert f"{name}_explain in {name}.o" in run("nm", "-s", made.static)
    assert run("ar", "t", made.static).split() == [f"{name}.o"]
    ctypes.CDLL(str(made.shared))
