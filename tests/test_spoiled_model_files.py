"""Valid HDF5 that is no valid model: refused, in words that say where."""

import os

import h5py
import numpy as np
import pytest
from model_files import numbers, write_small

from fastdtd import model_file
from fastdtd.errors import ModelError
from fastdtd.model_file import load


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.h5"


@pytest.fixture
def valid(path):
    """A small valid file, written by hand, to be spoiled."""
    return write_small(path)


def attribute(place, name, value):
    def spoil(file):
        file[place].attrs[name] = value
    return spoil


def without_attribute(place, name):
    def spoil(file):
        del file[place].attrs[name]
    return spoil


def dataset(place, data=None, **how):
    def spoil(file):
        if place in file:
            del file[place]
        file.create_dataset(place, data=data, **how)
    return spoil


def without(place):
    def spoil(file):
        del file[place]
    return spoil


def link(place, target):
    def spoil(file):
        if place in file:
            del file[place]
        file[place] = target
    return spoil


def virtual(file):
    layout = h5py.VirtualLayout((2, 3, 1, 1), "f4")
    layout[...] = h5py.VirtualSource("elsewhere.h5", "weight", (2, 3, 1, 1))
    del file["layers/a/weight"]
    file.create_virtual_dataset("layers/a/weight", layout)


def hard_link_cycle(file):
    file["layers/a/loop"] = file["layers"]
    file["layers/loop"] = file["layers"]


def layer_is_its_own_parent(file):
    file["layers/loop"] = file["layers"]


def scale_offset(file):
    del file["layers/a/weight"]
    file.create_dataset("layers/a/weight", data=numbers(2, 3, 1, 1), scaleoffset=2)


def two_compressions(file):
    del file["layers/a/bias"]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((2,))
    plist.set_deflate(4)
    plist.set_filter(h5py.h5z.FILTER_LZF)
    h5py.h5d.create(file["layers/a"].id, b"bias", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((2,)), plist)


def absurd_chunk(file):
    del file["layers/a/bias"]
    file.create_dataset("layers/a/bias", (2,), "f4", maxshape=(None,), chunks=(2**28,))


def strange_float(file):
    del file["layers/a/bias"]
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(100)
    h5py.h5d.create(file["layers/a"].id, b"bias", kind, h5py.h5s.create_simple((2,)))


def bias_of_another(file):
    second_layer("c", "a")(file)
    file["layers/c"].attrs["type"] = "dense"
    file["layers/c/weight"] = numbers(2, 2)
    file["layers/c/bias"] = file["layers/a/bias"]


def second_layer(name, inputs):
    def spoil(file):
        group = file.create_group("layers/c")
        group.attrs["type"], group.attrs["inputs"], group.attrs["name"] = "relu", inputs, name
    return spoil


def group_for_weights(file):
    del file["layers/a/bias"]
    file.create_group("layers/a/bias")


def attribute_name_not_utf8(file):
    h5py.h5a.create(file["layers/a"].id, b"\xff", h5py.h5t.STD_I32LE, h5py.h5s.create(h5py.h5s.SCALAR))


def named_type(file):
    file["layers/c"] = np.dtype("f4")


def empty_layers(file):
    del file["layers"]
    file.create_group("layers")


SPOILED = {
    "no format": (without_attribute("/", "format"), "no root attribute 'format'"),
    "other format": (attribute("/", "format", "keras"), "no root attribute 'format' that says 'fastdtd-model'"),
    "newer": (attribute("/", "version", 2), "has format version 2; this fastdtd reads version 1"),
    "version missing": (without_attribute("/", "version"), "has format version missing; this fastdtd reads version 1"),
    "version text": (attribute("/", "version", "1"), "has format version '1'; this fastdtd reads version 1"),
    "root attribute": (
        attribute("/", "classes", "x"),
        "the file has the unknown attribute 'classes'; known: format, version"),
    "root member": (dataset("labels", [1]), "the file has the unknown member 'labels'; known: input, layers"),
    "no input": (without("input"), "has no group '/input'"),
    "no layers group": (without("layers"), "has no group '/layers'"),
    "no layers": (empty_layers, "the network has no layers"),
    "layers a dataset": (dataset("layers", [1]), "/layers is a dataset; required: a group"),
    "layer a dataset": (dataset("layers/a", [1]), "group 'a' of /layers is a dataset; required: a group"),
    "layer a type": (named_type, "group 'c' of /layers is a datatype; required: a group"),
    "no shape": (without_attribute("input", "shape"), r"/input has shape missing; required: 3 integers"),
    "flat shape": (attribute("input", "shape", [3, 4]), r"/input has shape 3, 4; required: 3 integers"),
    "float shape": (attribute("input", "shape", [3.0, 4, 4]), r"/input has shape 3.0, 4.0, 4.0; required: 3 integers"),
    "zero shape": (attribute("input", "shape", [3, 0, 4]), r"the input has shape \(3, 0, 4\); required"),
    "huge shape": (attribute("input", "shape", [3, 2**40, 2**40]), r"the input has shape .* at most"),
    "input attribute": (
        attribute("input", "colour", "rgb"),
        "/input has the unknown attribute 'colour'; known: shape, color"),
    "input member": (dataset("input/men", [1.0]), "/input has the unknown member 'men'; known: mean, std, box"),
    "color": (attribute("input", "color", "cmyk"), "colour order 'cmyk' is unknown"),
    "color number": (attribute("input", "color", 3), "/input attribute 'color' is 3; required: one string"),
    "color channels": (attribute("input", "color", "gray"), "colour order 'gray' has 1 channels but"),
    "resize": (attribute("input", "resize", "pad"), "resize 'pad' is unknown"),
    "scale text": (attribute("input", "scale", "1"), "/input attribute 'scale' is '1'; required: one number"),
    "scale NaN": (attribute("input", "scale", np.nan), "scale nan; required: a finite float32 number"),
    "mean shape": (dataset("input/mean", [1.0, 2.0]), r"mean of shape \(2,\); required"),
    "mean axes": (dataset("input/mean", [[1.0]]), r"/input/mean has shape \(1, 1\); required: 0 or 1 or 3 axes"),
    "mean too large": (
        dataset("input/mean", shape=(2**29,), dtype="f4"),
        "/input/mean has 536870912 elements; at most"),
    "std zero": (dataset("input/std", 0.0), "std and scale must not be zero"),
    "box shape": (
        dataset("input/box", [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        r"/input/box has shape \(2, 3\); required: \(3, 2\)"),
    "box order": (dataset("input/box", [[1.0, 0.0]] * 3), "required: finite, and low below high"),
    "no type": (
        without_attribute("layers/a", "type"),
        "group 'a' of /layers attribute 'type' is missing; required: one string"),
    "unknown type": (
        attribute("layers/a", "type", "gelu"),
        "layer 'a' has the unknown type 'gelu'; required: one of conv2d, dense, relu"),
    "no inputs": (without_attribute("layers/a", "inputs"), "'a' has 0 inputs; Conv2d takes 1"),
    "input numbers": (
        attribute("layers/a", "inputs", [1, 2]),
        r"layer 'a' \(conv2d\) has inputs 1, 2; required: names of layers"),
    "two inputs": (attribute("layers/a", "inputs", ["input", "input"]), "'a' has 2 inputs; Conv2d takes 1"),
    "strides": (
        attribute("layers/a", "strides", 2),
        r"layer 'a' \(conv2d\) has the unknown attribute 'strides'; known: type, name, "),
    "kernel of a conv": (attribute("layers/a", "kernel", 1), "has the unknown attribute 'kernel'"),
    "layer member": (
        dataset("layers/a/biases", [1.0]),
        r"layer 'a' \(conv2d\) has the unknown member 'biases'; known: weight, bias"),
    "stride count": (attribute("layers/a", "stride", [1, 1, 1]), "has stride 1, 1, 1; required: 1 or 2 integers"),
    "stride float": (attribute("layers/a", "stride", 2.0), r"has stride 2\.0; required: 1 or 2 integers"),
    "stride zero": (attribute("layers/a", "stride", 0), r"has stride \(0, 0\); required: 2 integers from 1"),
    "stride huge": (attribute("layers/a", "stride", 2**62), "has stride .* required: 2 integers from 1"),
    "padding count": (attribute("layers/a", "padding", [1, 1, 1]), "has padding 1, 1, 1; required: 1, 2 or 4 integers"),
    "groups": (attribute("layers/a", "groups", [1, 1]), "has groups 1, 1; required: 1 integer"),
    "no kernel": (
        attribute("layers/b", "type", "max_pool2d"),
        r"layer 'b' \(max_pool2d\) has no attribute 'kernel'; required: one"),
    "no weight": (without("layers/a/weight"), r"layer 'a' \(conv2d\) has no dataset 'weight'; required: one"),
    "duplicate name": (second_layer("a", "a"), "layer name 'a' is taken or empty"),
    "reserved name": (second_layer("input", "a"), "layer name 'input' is taken or empty"),
    "cycle": (attribute("layers/a", "inputs", "b"), "cycle through 'a', 'b'"),
    "dangling": (attribute("layers/a", "inputs", "gone"), "layer 'a' reads 'gone', which no layer makes"),
    "weight axes": (
        dataset("layers/a/weight", numbers(2, 3)),
        r"layer 'a' \(conv2d\) weight has shape \(2, 3\); required: 4 axes"),
    "weight shape": (dataset("layers/a/weight", numbers(2, 4, 1, 1)), "expects 4 input channels"),
    "weight empty": (dataset("layers/a/weight", np.zeros((0, 3, 1, 1))), "required: 4 axes, none of them empty"),
    "weight null": (dataset("layers/a/weight", h5py.Empty("f4")), "has shape None; required: 4 axes"),
    "weight a group": (group_for_weights, "bias is a group; required: a dataset"),
    "weight integers": (
        dataset("layers/a/weight", np.ones((2, 3, 1, 1), int)),
        "weight is of HDF5 type Integer .* required: IEEE"),
    "weight strings": (dataset("layers/a/bias", ["1", "2"]), "bias is of HDF5 type String .* required: IEEE"),
    "weight fixed strings": (
        dataset("layers/a/bias", np.array([b"1", b"2"])),
        "bias is of HDF5 type String .* required: IEEE"),
    "weight compound": (dataset("layers/a/bias", np.zeros(2, "f4,f4")), "bias is of HDF5 type Compound"),
    "weight complex": (dataset("layers/a/bias", np.zeros(2, "c8")), "bias is of HDF5 type Comp"),
    "weight opaque": (dataset("layers/a/bias", np.zeros(2, "V4")), "bias is of HDF5 type Opaque"),
    "weight vlen": (dataset("layers/a/bias", shape=(2,), dtype=h5py.vlen_dtype("f4")), "bias is of HDF5 type Vlen"),
    "weight references": (dataset("layers/a/bias", shape=(2,), dtype=h5py.ref_dtype), "bias is of HDF5 type Reference"),
    "weight regions": (
        dataset("layers/a/bias", shape=(2,), dtype=h5py.regionref_dtype),
        "bias is of HDF5 type Reference"),
    "weight long double": (
        dataset("layers/a/bias", np.zeros(2, np.longdouble)),
        "bias is of HDF5 type Float .16 bytes"),
    "weight strange float": (strange_float, "bias is of HDF5 type Float .* required: IEEE"),
    "weight NaN": (dataset("layers/a/bias", [1.0, np.nan]), "layer 'a' has NaN or infinity in its bias"),
    "weight overflow": (dataset("layers/a/bias", [1.0, 1e300]), "layer 'a' has NaN or infinity in its bias"),
    "bias shape": (dataset("layers/a/bias", numbers(3)), r"bias of shape \(3,\); required: \(2,\)"),
    "too many numbers": (
        dataset("layers/a/bias", shape=(2**30 + 1,), dtype="f4"),
        "bias has 1073741825 elements; at most 1073741824"),
    "unwritten chunks": (
        dataset("layers/a/bias", shape=(2**30,), dtype="f4", compression="gzip"),
        "bias claims 4294967296 bytes but the file stores 0 for it; required: data that were written"),
    "unwritten": (
        dataset("layers/a/bias", shape=(2**30,), dtype="f4"),
        "bias claims 4294967296 bytes but the file stores 0"),
    "absurd chunk": (absurd_chunk, "bias claims 1073741824 bytes but the file stores 0"),
    "soft link": (
        link("layers/a/bias", h5py.SoftLink("/layers/a/weight")),
        "layer 'a' .* holds 'bias' as a soft, external"),
    "soft layer": (link("layers/c", h5py.SoftLink("/layers/a")), "/layers holds 'c' as a soft, external"),
    "external link": (
        link("layers/a/bias", h5py.ExternalLink("/etc/passwd", "/x")),
        "layer 'a' .* holds 'bias' as a soft, external"),
    "external root": (
        link("classes", h5py.ExternalLink("other.h5", "/x")),
        "the file holds 'classes' as a soft, external"),
    "shared": (bias_of_another, r"layer 'c' \(dense\) bias is the dataset of layer 'a' \(conv2d\) bias"),
    "virtual": (virtual, "layer 'a' .* weight is a virtual dataset"),
    "external storage": (
        dataset("layers/a/bias", shape=(2,), dtype="f4", external=[("/etc/passwd", 0, 8)]),
        "bias keeps its data in other files"),
    "hard-link cycle": (hard_link_cycle, "layer 'a' .* has the unknown member 'loop'"),
    "own parent": (layer_is_its_own_parent, "group 'loop' of /layers attribute 'type' is missing"),
    "scale-offset": (scale_offset, r"weight is stored with the HDF5 filters \[6\]; required: at most one of gzip"),
    "two compressions": (
        two_compressions,
        r"bias is stored with the HDF5 filters \[1, 32000\]; required: at most one of gzip"),
    "attribute reference": (
        lambda f: attribute("layers/a", "name", f["layers"].ref) (f),
        "'name' is neither text nor numbers"),
    "attribute compound": (
        attribute("layers/a", "stride", np.zeros(2, "i4,i4")),
        "'stride' is neither text nor numbers"),
    "attribute array type": (
        lambda f: f["layers/a"].attrs.create("stride", np.ones((1, 2), "i4"), (1, 2), np.dtype("(2,)i4")),
        "'stride' is neither text nor numbers"),
    "attribute null": (attribute("layers/a", "stride", h5py.Empty("i4")), "'stride' is empty; required: a value"),
    "attribute without elements": (
        attribute("layers/a", "stride", np.zeros(0, "i4")),
        "has stride of no elements; required"),
    "long string": (
        attribute("layers/a", "name", np.bytes_("x" * 5000)),
        "'name' has strings of 5000 bytes; at most 4096"),
    "long heap string": (attribute("layers/a", "name", "x" * 5000), "has a string of 5000 bytes; at most 4096"),
    "not UTF-8": (
        attribute("layers/a", "name", np.bytes_(b"\xff\xfe")),
        "'name' has the string .* required: ASCII or UTF-8"),
    "attribute name not UTF-8": (
        attribute_name_not_utf8,
        "group 'a' of /layers has the string .* required: ASCII or UTF-8"),
    "link name not UTF-8": (
        lambda f: h5py.h5g.create(f["layers"].id, b"\xff"),
        "/layers has the string .* required: ASCII or UTF-8"),
    "classes count": (dataset("classes", ["x"]), "names 1 classes but has 2 outputs"),
    "classes numbers": (dataset("classes", [1, 2]), "/classes is of HDF5 type Integer .* required: strings"),
    "classes axes": (dataset("classes", [["x", "y"]]), r"/classes has shape \(1, 2\); required: 1 axes"),
    "classes too many": (
        dataset("classes", shape=(10**6 + 1,), dtype="S1"),
        "/classes has 1000001 elements; at most 1000000"),
    "classes long": (
        dataset("classes", np.array([b"x" * 5000, b"y"])),
        "/classes is of HDF5 type String .5000 bytes.; required: strings of at most 4096 bytes"),
    "provenance number": (
        attribute("provenance", "year", 2017),
        "/provenance attribute 'year' is 2017; required: one string"),
    "provenance member": (dataset("provenance/x", [1]), "/provenance has the unknown member 'x'; known: none"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_spoiled(valid, spoil, message):
    with h5py.File(valid, "r+") as file:
        spoil(file)
    with pytest.raises(ModelError, match=message) as caught:
        load(valid)
    assert str(caught.value).startswith(f"model file {str(valid)!r}: ")


@pytest.mark.parametrize("value", [2, -1, [0, 1]])
def test_truth_values(valid, value):
    with h5py.File(valid, "r+") as file:
        file["layers/b"].attrs["type"] = "average_pool2d"
        file["layers/b"].attrs["kernel"] = 4
        file["layers/b"].attrs["count_include_pad"] = True
    assert load(valid).graph.layers[1].count_include_pad is True
    with h5py.File(valid, "r+") as file:
        file["layers/b"].attrs["count_include_pad"] = value
    with pytest.raises(ModelError, match=r"has count_include_pad .*; required: 0 or 1"):
        load(valid)


def test_huge_attribute(path):
    with h5py.File(path, "w",
                   libver="latest") as file:  # earlier versions of HDF5's objects keep attributes below 64 KiB
        file.attrs["format"], file.attrs["version"] = "fastdtd-model", 1
        file.create_group("layers")
        file.create_group("input").attrs["shape"] = np.ones(20_000, int)
    with pytest.raises(ModelError, match="/input attribute 'shape' has 20000 elements; at most 10000 are accepted"):
        load(path)


def test_long_objects_that_nobody_reads(valid):
    with h5py.File(valid, "r+") as file:
        kind = h5py.h5t.vlen_create(h5py.h5t.STD_U8LE)
        history = h5py.h5a.create(file["layers/a/bias"].id, b"history", kind, h5py.h5s.create_simple((1,)))
        value = np.empty(1, h5py.vlen_dtype("u1"))
        value[0] = np.zeros(5000, "u1")
        history.write(value)
    load(valid)


@pytest.mark.parametrize("size", [0xFFFFFFFFFFFFFFF0, 1 << 40, 4097, 0])
def test_damaged_string_heap(valid, size):
    """The first of these sizes makes libhdf5 2.0 loop for ever."""
    content = bytearray(valid.read_bytes())
    start = content.index(b"GCOL") + 16  # its first object
    content[start + 8:start + 16] = size.to_bytes(8, "little")
    valid.write_bytes(content)
    with pytest.raises(ModelError, match="has a damaged heap at byte"):
        load(valid)


def test_short_addresses(path):
    sizes = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    sizes.set_sizes(4, 4)
    h5py.h5f.create(os.fsencode(path), fcpl=sizes).close()
    with pytest.raises(ModelError, match="does not use 8-byte HDF5 addresses"):
        load(path)


def test_limits_on_the_whole_file(valid, monkeypatch):
    monkeypatch.setattr(model_file, "MAX_TOTAL_WEIGHTS", 7)
    with pytest.raises(ModelError, match=r"the weights up to layer 'a' \(conv2d\) are 8 numbers; at most 7"):
        load(valid)
    monkeypatch.undo()
    monkeypatch.setattr(model_file, "MAX_CLASSES_BYTES", 4096)
    with h5py.File(valid, "r+") as file:
        del file["classes"]
        file["classes"] = ["x" * 4000, "y" * 4000]
    with pytest.raises(ModelError, match="/classes has more than 4096 bytes of names"):
        load(valid)
    monkeypatch.setattr(model_file, "MAX_LAYERS", 1)
    with pytest.raises(ModelError, match="/layers holds more than 1 objects"):
        load(valid)


def test_loading_changes_nothing(valid):
    before = valid.read_bytes()
    valid.chmod(0o444)
    load(valid)
    assert valid.read_bytes() == before


