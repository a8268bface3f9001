"""Kernels for GPUs, in a simulator (tests/lockstep.py). tests/test_cuda_compiled.py looks at their machine code."""

import warnings

import naive
import numpy as np
import pytest
from fastdtd.kernels import cuda as device_kernels
from fastdtd.kernels.cuda import memory
from graphs import graphs_and_rules, pictures
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from single_layers import CONVOLUTIONS, POOLS, RULES, check, check_winner, convolution, weights

from fastdtd import devices
from fastdtd import graph as g
from fastdtd.errors import DeviceError, InputError
from fastdtd.explainer import Explainer, ExplanationWarning
from fastdtd.model import Model, Preprocessing
from fastdtd.plan import NoRoomError, Plan
from fastdtd.rules import search_direction

pytestmark = pytest.mark.usefixtures("simulator")
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

SMALL_TILES = ["several panels of outputs and inputs", "padding beyond the kernel", "stride over kernel, padded", "stride and dilation",
               "groups", "depthwise with a multiplier", "one pixel", "one channel, one output"]
LARGE = (3, 4, 5), 70, (3, 2), (2, 1), (1, 0, 1, 1), (1, 1), 1  # outputs that take two tiles of 64 rows


@pytest.mark.parametrize("precision", ["fp32", "tf32", "3xtf32"])
@pytest.mark.parametrize("case", SMALL_TILES)
def test_convolution(case, precision):
    check(convolution(case), CONVOLUTIONS[case][0], "z+", "relu", device="cuda", precision=precision,
          tolerance=2e-3 if precision == "tf32" else 1e-5)


@pytest.mark.parametrize(("rule", "hidden"), RULES)
def test_convolution_under_every_rule(rule, hidden):
    case = "stride and dilation"
    check(convolution(case), CONVOLUTIONS[case][0], rule, hidden, device="cuda", precision="fp32")
