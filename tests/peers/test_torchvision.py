"""torchvision's networks, whole: converted by one call, PyTorch's scores, relevance that adds up. Weights are random but seeded."""

import numpy as np
import pytest
import torch
import torch_nets  # noqa: F401  # makes torchvision importable
from torch import nn
from torchvision import models

from fastdtd import Explainer, from_torch

NETWORKS = ["alexnet", "vgg16", "vgg19_bn", "resnet18", "resnet50", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mnasnet1_0",
            "googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1", "regnet_x_400mf"]


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    torch.manual_seed(0)
    options = {"googlenet": {"init_weights": True, "aux_logits": False}, "inception_v3": {"init_weights": True}}.get(name, {})
    module = getattr(models, name)(weights=None, **options).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):  # as after training, not as new
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    size = 299 if name == "inception_v3" else 224
    batch = torch.rand(1, 3, size, size)
    e = Explainer(from_torch(module, batch, box=(0, 1)))(batch.numpy())
    with torch.inference_mode():
        expected = module(batch).numpy()
    difference = np.abs(e.output - expected).max() / np.abs(expected).max()
    print(f"{name}: scores within {difference:.1e}, absorbed {e.absorbed[0] / e.explained[0]:.1%}")
    assert difference <= 1e-5
    assert e.explained[0] > 0
    np.testing.assert_allclose(e.relevance.sum(dtype=float) + e.absorbed[0], e.explained[0], rtol=1e-5)
    assert e.relevance.min() >= 0
