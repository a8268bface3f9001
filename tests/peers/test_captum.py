"""Agreement with Captum's "deep Taylor" (Alpha1_Beta0_Rule), its biases left out, on layers in a row."""

import numpy as np
import pytest
import torch
from torch_nets import CaptumExplainer

from fastdtd import Explainer, Model, Preprocessing
from fastdtd import graph as g


@pytest.mark.parametrize("seed", range(10))
def test_layers_in_a_row(seed):
    rng = np.random.default_rng(seed)
    graph = g.Graph(
        (g.Conv2d("a", (g.INPUT, ), rng.standard_normal(
            (5, 2, 3, 3)), 0.1 * rng.standard_normal(5), padding=(1, ) * 4), g.ReLU("a+", ("a", )),
         g.MaxPool2d("p", ("a+", ), (2, 2),
                     (2, 2)), g.Conv2d("b", ("p", ), rng.standard_normal(
                         (7, 5, 2, 2)), 0.1 * rng.standard_normal(7)), g.ReLU("b+", ("b", )),
         g.AveragePool2d("q", ("b+", ), (2, 2),
                         (1, 1)), g.Flatten("f", ("q", )), g.Dense("c", ("f", ), rng.random((3, 7 * 3 * 2))),
         ), (2, 10, 8), (0.0, 1.0))
    explainer = Explainer(Model(graph, Preprocessing(None)), {"a": "z+"}, threads=1)
    batch = rng.random((4, 2, 10, 8), np.float32)
    e = explainer(batch)
    assert (e.explained > 0).all()
    theirs = CaptumExplainer(graph)(torch.tensor(batch), e.target).numpy()
    assert np.linalg.norm(e.relevance - theirs) <= 1e-5 * np.linalg.norm(theirs)
