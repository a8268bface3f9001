"""The networks that are measured: well-known ones as Graphs, with seeded random weights (He et al. 2015) and batch norm
folded.
"""

from functools import partial

import numpy as np

import fastdtd
from fastdtd import graph as g


class _Builder:
    """Adds layers one after the other; each method returns the name of the tensor that it makes."""

    def __init__(self, channels, size, seed):
        self.layers, self.input_shape = [], (channels, size, size)
        self.channels = {g.INPUT: channels}
        self.random = np.random.default_rng(seed)

    def add(self, layer, channels):
        self.layers.append(layer)
        self.channels[layer.name] = channels
        return layer.name

    def _weights(self, *shape):
        fan_in = np.prod(shape[1:])
        weight = self.random.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan_in))
        return weight, np.float32(-0.05) * self.random.random(shape[0], np.float32)

    def conv(self, source, outputs, kernel, stride=1, padding=0, groups=1, relu=True):
        weight, bias = self._weights(outputs, self.channels[source] // groups, kernel, kernel)
        name = self.add(
            g.Conv2d(f"conv{len(self.layers)}", (source, ), weight, bias, stride=(stride, ) * 2,
                     padding=(padding, ) * 4, groups=groups), outputs)
        return self.relu(name) if relu else name

    def dense(self, source, inputs, outputs, relu=True):
        weight, bias = self._weights(outputs, inputs)
        name = self.add(g.Dense(f"dense{len(self.layers)}", (source,), weight, bias), outputs)
        return self.relu(name) if relu else name

    def relu(self, source):
        return self.add(g.ReLU(f"relu{len(self.layers)}", (source,)), self.channels[source])

    def norm(self, source, wanted=True):
        """Local response normalisation with the constants of both networks that have it."""
        if not wanted:
            return source
        return self.add(g.LocalResponseNorm(f"norm{len(self.layers)}", (source,), 5, 1e-4, 0.75), self.channels[source])

    def pool(self, source, kernel, stride, padding=0, ceil_mode=False):
        return self.add(
            g.MaxPool2d(f"pool{len(self.layers)}", (source, ), (kernel, ) * 2, (stride, ) * 2, (padding, ) * 4,
                        ceil_mode), self.channels[source])

    def average(self, source):
        return self.add(g.GlobalAveragePool(f"average{len(self.layers)}", (source,)), self.channels[source])

    def flatten(self, source):
        return self.add(g.Flatten(f"flatten{len(self.layers)}", (source,)), None)

    def concat(self, *sources):
        return self.add(g.Concat(f"concat{len(self.layers)}", sources),
                        sum(self.channels[source] for source in sources))

    def sum(self, a, b):
        return self.relu(self.add(g.Add(f"sum{len(self.layers)}", (a, b)), self.channels[a]))

    def graph(self):
        """The network of pixels between -2 and 2, about what the usual preprocessing of photographs gives."""
        channels = self.input_shape[0]
        return g.Graph(tuple(self.layers), self.input_shape,
                       (np.full(channels, -2, np.float32), np.full(channels, 2, np.float32)))


def lenet():
    """LeCun et al. 1998, in the form that is usual today: ReLU, max-pools."""
    b = _Builder(1, 28, 1)
    x = b.pool(b.conv(g.INPUT, 20, 5), 2, 2)
    x = b.pool(b.conv(x, 50, 5), 2, 2)
    b.dense(b.dense(b.flatten(x), 800, 500), 500, 10, relu=False)
    return b.graph()


def squeezenet():
    """SqueezeNet 1.1, Iandola et al. 2016."""
    b = _Builder(3, 224, 2)
    x = b.pool(b.conv(g.INPUT, 64, 3, stride=2), 3, 2, ceil_mode=True)
    for i, (squeeze, expand) in enumerate(
        ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))):
        if i in (2, 4):
            x = b.pool(x, 3, 2, ceil_mode=True)
        x = b.conv(x, squeeze, 1)
        x = b.concat(b.conv(x, expand, 1), b.conv(x, expand, 3, padding=1))
    b.average(b.conv(x, 1000, 1))
    return b.graph()


def mobilenet():
    """MobileNet v1, Howard et al. 2017."""
    b = _Builder(3, 224, 3)
    x = b.conv(g.INPUT, 32, 3, stride=2, padding=1)
    for outputs, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2),
                            (1024, 1)):
        x = b.conv(x, b.channels[x], 3, stride=stride, padding=1, groups=b.channels[x])
        x = b.conv(x, outputs, 1)
    b.dense(b.flatten(b.average(x)), 1024, 1000, relu=False)
    return b.graph()


def alexnet(norm=False):
    """Krizhevsky et al. 2012, in two groups, as Caffe has it (normalised after the pools)."""
    b = _Builder(3, 227, 4)
    x = b.norm(b.pool(b.conv(g.INPUT, 96, 11, stride=4), 3, 2), norm)
    x = b.norm(b.pool(b.conv(x, 256, 5, padding=2, groups=2), 3, 2), norm)
    x = b.conv(x, 384, 3, padding=1)
    x = b.conv(x, 384, 3, padding=1, groups=2)
    x = b.pool(b.conv(x, 256, 3, padding=1, groups=2), 3, 2)
    x = b.dense(b.flatten(x), 256 * 6 * 6, 4096)
    b.dense(b.dense(x, 4096, 4096), 4096, 1000, relu=False)
    return b.graph()


def resnet18():
    """He et al. 2016."""
    b = _Builder(3, 224, 5)
    x = b.pool(b.conv(g.INPUT, 64, 7, stride=2, padding=3), 3, 2, padding=1)
    for outputs, first_stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for stride in (first_stride, 1):
            y = b.conv(b.conv(x, outputs, 3, stride=stride, padding=1), outputs, 3, padding=1, relu=False)
            if stride != 1:
                x = b.conv(x, outputs, 1, stride=stride, relu=False)
            x = b.sum(y, x)
    b.dense(b.flatten(b.average(x)), 512, 1000, relu=False)
    return b.graph()


def googlenet(norm=False):
    """Szegedy et al. 2015, without its auxiliary classifiers."""
    b = _Builder(3, 224, 6)
    x = b.norm(b.pool(b.conv(g.INPUT, 64, 7, stride=2, padding=3), 3, 2, ceil_mode=True), norm)
    x = b.pool(b.norm(b.conv(b.conv(x, 64, 1), 192, 3, padding=1), norm), 3, 2, ceil_mode=True)
    blocks = ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), None, (192, 96, 208, 16, 48, 64),
              (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
              (256, 160, 320, 32, 128, 128), None, (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128))
    for block in blocks:
        if block is None:
            x = b.pool(x, 3, 2, ceil_mode=True)
            continue
        one, reduce3, three, reduce5, five, after_pool = block
        x = b.concat(b.conv(x, one, 1), b.conv(b.conv(x, reduce3, 1), three, 3, padding=1),
                     b.conv(b.conv(x, reduce5, 1), five, 5, padding=2),
                     b.conv(b.pool(x, 3, 1, padding=1), after_pool, 1))
    b.dense(b.flatten(b.average(x)), 1024, 1000, relu=False)
    return b.graph()


def vgg16():
    """Simonyan and Zisserman 2015."""
    b = _Builder(3, 224, 7)
    x = g.INPUT
    for outputs, repeat in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeat):
            x = b.conv(x, outputs, 3, padding=1)
        x = b.pool(x, 2, 2)
    x = b.dense(b.flatten(x), 512 * 7 * 7, 4096)
    b.dense(b.dense(x, 4096, 4096), 4096, 1000, relu=False)
    return b.graph()


NETWORKS = {
    "LeNet": lenet, "SqueezeNet 1.1": squeezenet, "MobileNet v1": mobilenet, "AlexNet": alexnet, "ResNet-18": resnet18,
    "GoogLeNet": googlenet, "VGG-16": vgg16, "AlexNet with LRN": partial(alexnet, norm=True),
    "GoogLeNet with LRN": partial(googlenet, norm=True)
}


def averaged(graph):
    """The same network with average pools: no winner of a max-pool that turns on the last bit."""
    return g.Graph(
        tuple(
            g.AveragePool2d(layer.name, layer.inputs, layer.kernel, layer.stride, layer.padding, layer.ceil_mode
                            ) if isinstance(layer, g.MaxPool2d) else layer
            for layer in graph), graph.input_shape, graph.box)


def network(name):
    """One of NETWORKS, or that of a model file."""
    if name in NETWORKS:
        return NETWORKS[name]()
    return fastdtd.load(name).graph


def pictures(graph, count, seed=0):
    """(count, C, H, W) float32, smooth like photographs rather than noise, within the graph's box."""
    channels, height, width = graph.input_shape
    random = np.random.default_rng(seed)
    coarse = random.random((count, channels, -(-height // 8) + 1, -(-width // 8) + 1), np.float32)
    fine = np.repeat(np.repeat(coarse, 8, 2), 8, 3)[:, :, :height, :width]
    fine = fine + 0.2 * random.random((count, channels, height, width), np.float32)
    low, high = (bound[:, None, None] for bound in graph.box)
    return np.asarray(low + (high - low) * fine / np.float32(1.2), np.float32)
