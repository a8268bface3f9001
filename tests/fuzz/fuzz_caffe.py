"""Caffe: the network's text and its weights, as messages and as bytes."""

from fuzzing import Format, check_model, convert
from google.protobuf import text_format
from importing import caffemodel, numbers
from mutating import smaller_messages, spoil_message, spoiled

from fastdtd.importers.caffe import OPERATORS, NetParameter

TEXT, WEIGHTS = "net.prototxt", "net.caffemodel"
WORDS = (*OPERATORS, "Input", "Data", "Accuracy", "Silence", "Sigmoid", "x", "", "a" * 300)
LAYERS = '''
layer { name: "c" type: "Convolution" bottom: "x" top: "c" convolution_param { num_output: 4 kernel_size: 3 pad: 1
        stride: 2 } }
layer { name: "r" type: "ReLU" bottom: "c" top: "c" }
layer { name: "n" type: "BatchNorm" bottom: "c" top: "n" batch_norm_param { eps: 0.001 } }
layer { name: "s" type: "Scale" bottom: "n" top: "n" scale_param { bias_term: true } }
layer { name: "l" type: "LRN" bottom: "n" top: "l" lrn_param { local_size: 3 alpha: 0.1 } }
layer { name: "p" type: "Pooling" bottom: "l" top: "p" pooling_param { pool: MAX kernel_size: 2 stride: 2 } }
layer { name: "d" type: "Deconvolution" bottom: "p" top: "d" convolution_param { num_output: 4 kernel_size: 2
        bias_term: false } }
layer { name: "j" type: "Concat" bottom: "d" bottom: "d" top: "j" }
layer { name: "a" type: "Eltwise" bottom: "j" bottom: "j" top: "a" eltwise_param { operation: SUM } }
layer { name: "g" type: "Pooling" bottom: "a" top: "g" pooling_param { pool: AVE global_pooling: true } }
layer { name: "f" type: "InnerProduct" bottom: "g" top: "f" inner_product_param { num_output: 3 } }
layer { name: "z" type: "Softmax" bottom: "f" top: "z" }
'''
ARRAYS = {"c": [numbers(4, 3, 3, 3), numbers(4)], "n": [numbers(4), numbers(4) ** 2, numbers(1) ** 2],
          "s": [numbers(4), numbers(4)], "d": [numbers(4, 4, 2, 2)], "f": [numbers(3, 8), numbers(3) ** 2]}
OLD = '''
input: "x" input_dim: 1 input_dim: 3 input_dim: 9 input_dim: 8
layers { name: "c" type: CONVOLUTION bottom: "x" top: "c" convolution_param { num_output: 4 kernel_size: 3 } }
layers { name: "r" type: RELU bottom: "c" top: "c" }
layers { name: "f" type: INNER_PRODUCT bottom: "c" top: "f" inner_product_param { num_output: 2 } }
'''
OLD_ARRAYS = {"c": [numbers(4, 3, 3, 3), numbers(4)], "f": [numbers(2, 168), numbers(2) + 9]}


def written(text, arrays, is_old):
    """A case of Caffe's two layouts."""
    return {TEXT: text.encode(), WEIGHTS: caffemodel(arrays, is_old)}


BASES = [written('input: "x" input_shape { dim: 10 dim: 3 dim: 9 dim: 8 }' + LAYERS, ARRAYS, False),
         written('layer { name: "i" type: "Input" top: "x" input_param { shape { dim: 1 dim: 3 dim: 9 dim: 8 } } }'
                 + LAYERS, ARRAYS, False), written(OLD, OLD_ARRAYS, True)]


def mutate(case, rng):
    how = rng.random()
    if how < 0.1:
        return case | {TEXT: spoiled(rng, case[TEXT])}
    if how < 0.2:
        return case | {WEIGHTS: spoiled(rng, case[WEIGHTS])}
    network, weights = text_format.Parse(case[TEXT].decode(), NetParameter()), NetParameter.FromString(case[WEIGHTS])
    if how < 0.8:
        spoil_message(rng, network, WORDS)
    if how > 0.7:
        spoil_message(rng, weights, WORDS)
    text = text_format.MessageToString(network)
    if rng.random() < 0.05:
        text = text.replace("{", "{" * 2000, 1) if rng.random() < 0.3 else text * rng.choice([2, 50])
    return {TEXT: text.encode(), WEIGHTS: weights.SerializeToString()}


def use(folder):
    check_model(convert(folder / TEXT, folder / WEIGHTS), folder)


def smaller(case):
    try:
        network, weights = text_format.Parse(case[TEXT], NetParameter()), NetParameter.FromString(case[WEIGHTS])
    except Exception:  # protobuf's
        return
    for one in smaller_messages(network):
        yield case | {TEXT: text_format.MessageToString(one).encode()}
    for one in smaller_messages(weights):
        yield case | {WEIGHTS: one.SerializeToString()}


FORMAT = Format("caffe", BASES, mutate, use, smaller)
