"""Views of layers' outputs: by strides or by an index, each move gives what NumPy gives."""

import math
import tracemalloc

import numpy as np
import pytest
from importing import numbers

from fastdtd import graph as g
from fastdtd.errors import ConversionError
from fastdtd.importers.budget import Budget
from fastdtd.importers.builder import Builder
from fastdtd.importers.tensors import Tensor


def divisors(n):
    return [m for m in range(1, n + 1) if n % m == 0]


def some_move(rng, b, x, array):
    """`x` and `array` moved in the same way."""
    rank = len(x.dims)
    match rng.integers(7):
        case 0:
            order = rng.permutation(rank)
            return b.transpose(x, [0, *(int(i) + 1 for i in order)]), array.transpose(order)
        case 1:
            first = int(rng.choice(divisors(x.elements)))
            second = int(rng.choice(divisors(x.elements // first)))
            dims = (first, second, x.elements // first // second)
            return b.with_dims(x, dims), array.reshape(dims)
        case 2:
            axis = int(rng.integers(rank))
            n = x.dims[axis]
            start = int(rng.integers(n))
            part = slice(start, int(rng.integers(start, n)) + 1, int(rng.integers(1, 3)))
            part = part if rng.integers(3) else slice(None, None, -1)
            return b.take(x, axis + 1, part), array[(slice(None),) * axis + (part,)]
        case 3:
            pads = [tuple(map(int, rng.integers(0, 2, 2))) for _ in range(rank)]
            return b.pad(x, [(0, 0), *pads]), np.pad(array, pads, constant_values=-1)
        case 4:
            axes = [int(rng.integers(rank + 1)) + 1]
            return b.unsqueeze(x, axes), np.expand_dims(array, axes[0] - 1)
        case 5:
            dims = [int(rng.integers(1, 3)) if n == 1 else n for n in x.dims]
            return b.expand(x, [1, *dims]), np.broadcast_to(array, dims)
    axis = int(rng.integers(rank))
    positions = rng.integers(0, x.dims[axis], 3)
    return b.take(x, axis + 1, positions), np.take(array, positions, axis)


@pytest.mark.parametrize("seed", range(150))
def test_moves_are_numpys(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(map(int, rng.integers(1, 7, 3)))
    b, x = Builder(Budget()), Tensor.whole("input", shape)
    array = np.arange(math.prod(shape)).reshape(shape)
    for _ in range(rng.integers(1, 8)):
        if x.elements > 5000 or len(x.dims) > 6:
            break
        x, array = some_move(rng, b, x, array)
        assert x.dims == array.shape
        assert np.array_equal(x.indices(), array)
        is_whole = array.size == math.prod(shape) and np.array_equal(array.ravel(), np.arange(array.size))
        assert x.is_whole == is_whole
        assert x.has_zeros == (array < 0).any()
        assert x.has_view_of(Tensor("input", shape).with_index(array.astype(np.int32), ""))


def test_moves_of_strides_allocate_nothing():
    b, x = Builder(Budget()), Tensor.whole("input", (64, 1024, 1024))
    tracemalloc.start()
    for _ in range(10):
        x = b.channels_last(x)
        x = b.with_dims(b.flatten(x), (1024, 512, 2, 64))
        x = b.shuffle(x, x.dims, (3, 0, 1, 2), (64, 1024, 1024))
    y = b.depth_to_space(b.take(x, 2, slice(4, None)), 4, channels_first=True)
    y = b.pad(y, [(0, 0), (0, 0), (16, 0), (1, 1)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert x.is_whole
    assert y.dims == (4, 4096, 4098)
    assert peak < 2**20


def test_equal_views_have_equal_strides():
    b, x = Builder(Budget()), Tensor.whole("input", (6, 4, 5))
    one = b.shuffle(x, (2, 3, 20), (1, 0, 2), (6, 20))
    other = b.with_dims(b.transpose(b.with_dims(x, (2, 3, 4, 5)), [0, 2, 1, 3, 4]), (3, 2, 20))
    assert (one.axes, one.offset) == (b.with_dims(other, (6, 20)).axes, 0)
    assert b.are_same(one, b.with_dims(other, (6, 20)))
    assert not b.are_same(one, b.with_dims(x, (6, 20)))


@pytest.mark.parametrize(("relu", "padding", "rearranged"), [(True, (1, 2, 0, 1), 0), (False, (0, 0, 0, 0), 1)])
def test_zeros_join_a_max_pool_over_what_is_not_negative(relu, padding, rearranged):
    b, x = Builder(Budget()), Tensor.whole("input", (2, 5, 6))
    b.node.layer_name = "layer"
    padded = b.pad(b.relu(x) if relu else x, [(0, 0), (0, 0), (1, 0), (2, 1)])
    pool = b.layers[b.pool(padded, False, (3, 3), (1, 1), (0, 0, 0, 0)).layer]
    assert pool.padding == padding
    assert sum(isinstance(layer, g.Rearrange) for layer in b.layers.values()) == rearranged
    # With a window of zeros alone they do not.
    b.pool(b.pad(b.relu(x), [(0, 0), (0, 0), (3, 0), (0, 0)]), False, (3, 3), (1, 1), (0, 0, 0, 0))
    assert sum(isinstance(layer, g.Rearrange) for layer in b.layers.values()) == rearranged + 1


def test_dense_weights_are_moved_and_not_elements():
    b, x, weight = Builder(Budget()), Tensor.whole("input", (3, 4, 5)), numbers(2, 60)
    b.node.layer_name = "layer"
    dense = b.layers[b.dense(b.flatten(b.channels_last(x)), weight, None).layer]
    assert [type(layer) for layer in b.layers.values()] == [g.Flatten, g.Dense]
    image = numbers(3, 4, 5, seed=1)
    np.testing.assert_allclose(dense.weight @ image.ravel(), weight @ image.transpose(1, 2, 0).ravel(), rtol=1e-4)
    some = b.flatten(b.take(x, 1, slice(0, 2)))  # not all elements: these are moved
    assert isinstance(b.layers[b.layers[b.dense(some, weight[:, :40], None).layer].inputs[0]], g.Rearrange)


def test_constants_in_padding_alone():
    b, x = Builder(Budget()), Tensor.whole("input", (3, 4, 1))
    padded = b.affine(b.pad(x, [(0, 0), (1, 0), (0, 0), (0, 0)]), shift=np.array([1.0, 0, 0, 0]).reshape(1, 4, 1, 1))
    assert padded.shape == (4, 4, 1)
    assert b.layers[padded.layer].shift.tolist() == [1, 0, 0, 0]


def test_constants_that_differ_within_a_channel():
    b, x = Builder(Budget()), Tensor.whole("input", (3, 4, 1))
    b.node.layer_name = "layer"
    flat = b.affine(b.flatten(x), np.arange(12.0)[None])  # a Flatten's features are channels
    assert b.layers[flat.layer].scale.tolist() == list(range(12))
    image = b.affine(x, np.arange(12.0).reshape(1, 3, 4, 1))
    assert (image.dims, b.layers[image.layer].scale.tolist()) == ((3, 4, 1), list(range(12)))
    with pytest.raises(ConversionError, match=r"constant of shape \(1, 4, 1, 1\) for a tensor \(N, 3, 4, 1\)"):
        b.affine(x, np.ones((1, 4, 1, 1)))
