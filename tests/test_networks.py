"""Real trained networks on real pictures: what they say, what is conserved, and that every way into the package gives
the same.
"""

import gzip

import numpy as np
import pytest

import fastdtd

# all explain the same photographs with the same network
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("networks")]
CAFFE_PIXELS = {"color": "bgr", "mean": (104, 117, 123), "box": [(-104, 151), (-117, 138), (-123, 132)]}
WINNERS = {
    "castle.jpg": 483, "cat19.jpg": 281, "chelsea.png": 285, "coffee.png": 967, "espresso1.jpg": 967, "frog13.jpg": 30,
    "goldfish2.jpg": 1, "ladybug1.jpg": 301, "parrot.jpg": 88, "rooster1.jpg": 7, "scooter1.jpg": 665, "shark1.jpg": 3,
    "shark3.jpg": 4, "shark5.jpg": 3, "volcano2.jpg": 980, "wolf1.jpg": 269, "zebra.jpg": 340,
}


@pytest.fixture(scope="module")
def squeezenet(data):
    return fastdtd.convert(data / "models/squeezenet_v1.1/squeezenet_v1.1.onnx",
                           labels=data / "labels/synset_words.txt", **CAFFE_PIXELS)


@pytest.fixture(scope="module")
def batch(squeezenet, photographs):
    return np.stack([squeezenet.preprocess(path) for path in photographs])


def test_squeezenet_names_and_conserves(squeezenet, photographs, batch):
    e = fastdtd.Explainer(squeezenet)(batch)
    assert {path.name: int(target) for path, target in zip(photographs, e.target, strict=True)} == WINNERS
    sums = e.relevance.sum((1, 2, 3), dtype=np.float64)
    off = np.abs(sums + e.absorbed - e.explained) / e.explained
    print("conservation over", len(off), "pictures, relative:", " ".join(f"{value:.1e}" for value in off))
    assert off.max() <= 1e-5
    assert (e.relevance >= 0).all()


def test_squeezenet_from_caffe_explains_the_same(data, squeezenet, batch):
    folder = data / "models/squeezenet_v1.1"
    caffe = fastdtd.convert(folder / "deploy.prototxt", folder / "squeezenet_v1.1.caffemodel", **CAFFE_PIXELS)
    one, other = fastdtd.Explainer(squeezenet)(batch), fastdtd.Explainer(caffe)(batch)
    assert (one.output == other.output).all()
    assert (one.relevance == other.relevance).all()


def test_the_bundled_network_is_squeezenet_in_half_precision(squeezenet, batch):
    bundled = fastdtd.Explainer(fastdtd.load("squeezenet1_1"))(batch)
    exact = fastdtd.Explainer(squeezenet)(batch)
    assert (bundled.target == exact.target).all()
    assert np.abs(bundled.output - exact.output).max() <= 2e-3 * np.abs(exact.output).max()


def test_lenet_on_ten_thousand_digits(data):
    folder = data / "models/lenet_mnist"
    model = fastdtd.convert(folder / "lenet.prototxt", folder / "lenet_iter_10000.caffemodel", scale=1 / 256,
                            box=(0, 255 / 256))
    digits = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8,
                           offset=16).reshape(-1, 1, 28, 28)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    e = fastdtd.Explainer(model)(digits.astype(np.float32) / 256)
    assert (e.target == labels).mean() == 0.9905
    assert (e.relevance >= 0).all()
    np.testing.assert_allclose(e.relevance.sum((1, 2, 3), dtype=np.float64) + e.absorbed, e.explained, rtol=1e-5)
