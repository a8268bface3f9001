"""Quantus's metrics with explanations of ours: `make test-quantus`, in an environment of its own."""

import numpy as np
import pytest

quantus = pytest.importorskip("quantus")

import torch  # noqa: E402  # with Quantus alone

import fastdtd  # noqa: E402

SIDE, COUNT = 16, 6


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(),
                               torch.nn.Linear(8 * 7 * 7, 10)).eval()


@pytest.fixture(scope="module")
def explainer(net):
    return fastdtd.Explainer(fastdtd.from_torch(net, torch.zeros(1, 3, SIDE, SIDE), box=(0, 1)))


@pytest.fixture(scope="module")
def batch(explainer):
    x = np.random.default_rng(0).random((COUNT, 3, SIDE, SIDE), np.float32)
    return x, explainer.predict(x).argmax(1)


def test_explanations_are_the_explainers(explainer, batch):
    x, y = batch
    found = fastdtd.explain_func(None, x, y, explainer=explainer, device="cpu")
    np.testing.assert_array_equal(found, explainer(x, y).relevance)
    with pytest.raises(fastdtd.InputError, match="explainer is None; required: an Explainer"):
        fastdtd.explain_func(None, x, y, explainer=None)


@pytest.mark.parametrize("metric", ["Sparseness", "Complexity", "EffectiveComplexity"])
def test_metrics_that_need_no_model(metric, explainer, batch):
    x, y = batch
    a = fastdtd.explain_func(None, x, y, explainer=explainer)
    scores = getattr(quantus, metric)(disable_warnings=True)(model=None, x_batch=x, y_batch=y, a_batch=a)
    assert len(scores) == COUNT
    assert np.isfinite(scores).all()


def test_localisation(explainer, batch):
    """Of pixels: all channels together."""
    x, y = batch
    a = fastdtd.explain_func(None, x, y, explainer=explainer).sum(1, keepdims=True)
    s = np.zeros((COUNT, 1, SIDE, SIDE), bool)
    s[:, :, :, :SIDE // 2] = True
    metric = quantus.RelevanceMassAccuracy(abs=False, normalise=False, disable_warnings=True)
    scores = metric(model=None, x_batch=x, y_batch=y, a_batch=a, s_batch=s)
    np.testing.assert_allclose(scores, a[..., :SIDE // 2].sum((1, 2, 3)) / a.sum((1, 2, 3)), rtol=1e-4)


def scores_of(metric, options, model, explainer, batch):
    x, y = batch
    scores = getattr(quantus, metric)(**options, disable_warnings=True)(
        model=model, x_batch=x, y_batch=y, explain_func=fastdtd.explain_func,
        explain_func_kwargs={"explainer": explainer}, device="cpu")
    assert np.isfinite(scores).all()
    return np.asarray(scores)


@pytest.mark.filterwarnings("ignore:.*beyond the model's value box")  # it adds noise
def test_robustness_needs_no_model_either(explainer, batch):
    options = {"nr_samples": 3, "lower_bound": 0.01}
    assert scores_of("MaxSensitivity", options, None, explainer, batch).shape == (COUNT,)


def test_metrics_that_ask_the_twin(net, explainer, batch):
    """The module that the network was converted from predicts, the explainer explains."""
    options = {"features_in_step": 64, "perturb_baseline": "uniform"}
    assert len(scores_of("PixelFlipping", options, net, explainer, batch)) == COUNT
    options = {"patch_size": 4, "regions_evaluation": 5}
    assert scores_of("RegionPerturbation", options, net, explainer, batch).shape == (COUNT, 5)
