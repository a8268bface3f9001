"""Explanations for Quantus (Hedström et al. 2023), whose metrics ask for them by a function."""

from __future__ import annotations

from typing import Any

from fastdtd.errors import InputError, shown
from fastdtd.explainer import Explainer
from fastdtd.graph import Array


def explain_func(model: Any, inputs: Any, targets: Any, *, explainer: Explainer, **_: Any) -> Array:
    """What Quantus's metrics take as `explain_func`.

    Parameters
    ----------
    model : object
        Not looked at: what explains is `explainer`. Quantus passes what its metric was given.
    inputs : (N, C, H, W) array
        As the network takes them.
    targets : (N,) array of int
        The outputs to explain.
    explainer : Explainer
        By ``explain_func_kwargs={"explainer": explainer}`` of the metric's call.
    **_
        What else Quantus passes, such as `device`; not looked at.

    Returns
    -------
    (N, C, H, W) float32

    Raises
    ------
    InputError
        No explainer; or inputs and targets that do not fit, as an explainer says it.

    Examples
    --------
    >>> import fastdtd
    >>> model = fastdtd.load("squeezenet1_1")
    >>> explainer = fastdtd.Explainer(model)
    >>> fastdtd.explain_func(None, model.preprocess("cat.jpg")[None], [285], explainer=explainer).shape
    (1, 3, 227, 227)

    References
    ----------
    Hedström, Weber, Krakowczyk, Bareeva, Motzkus, Samek, Lapuschkin, Höhne: Quantus: An Explainable AI Toolkit for
    Responsible Evaluation of Neural Network Explanations and Beyond. Journal of Machine Learning Research 24(34), 2023.
    """
    if not isinstance(explainer, Explainer):
        raise InputError(f"explainer is {shown(explainer)}; required: an Explainer, by explain_func_kwargs={{"
                         '"explainer": fastdtd.Explainer(model)}')
    return explainer(inputs, targets).relevance
