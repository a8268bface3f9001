"""A converted network's scores compared with those that its source's own framework gives for random inputs.

A reader says by a `Runtime` how its source is run, and which tensor of the source each of its nodes became. Where
scores differ, that tells by bisection which node is the first whose values do.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from fastdtd.cost import cost, multiply_adds
from fastdtd.errors import ConversionError, FastDTDError
from fastdtd.graph import INPUT, Conv2d, Graph, Pool2d
from fastdtd.importers.builder import Builder
from fastdtd.importers.moves import Array
from fastdtd.importers.tensors import Tensor
from fastdtd.model import Model, Preprocessing

TOLERANCE = 1e-3  # of the largest score
MEMORY = "4GiB"  # for the converted network's activations, and MAX_ELEMENTS for those of the source
MAX_ELEMENTS = 2**30  # float32: 4 GiB
_LEAST_PROBABILITY = 1e-30  # whose logarithm float32 still knows
_MOST_LOGIT = 9.0  # of a sigmoid: nearer to 0 and to 1 its rounding counts, and what runtimes make of the exponential
_LOG = logging.getLogger("fastdtd")


class NotComparedError(Exception):
    """Why there is nothing to compare with; the text is for the user."""


@dataclass
class Runtime:
    """A source as its own framework runs it; each source has its kind.

    builder : what made the network's layers
    inputs : the source's inputs, as views of the network's
    batch : images that the source takes at a time
    dtype : of its input, and of each of several where `dtypes` does not say others
    dtypes : of each input
    tolerance : relative to the largest score; more than `TOLERANCE` where the source computes in half precision
    bounds : between which random inputs are drawn where the network has no value box and they are no whole numbers
    rounds_probabilities : whether they are whole numbers of a step, so that they, not their logarithms, are compared
    elements : of all that its nodes make for a batch, where that is known; what is a view here may be an array there
    steps : in the source's order, for each node what it is called in messages, its key for `run`, and its value
    """

    builder: Builder
    inputs: Sequence[Tensor]
    batch: int = 1
    dtype: Any = np.float32
    dtypes: Sequence[Any] = ()
    tolerance: float = TOLERANCE
    bounds: tuple[float, float] = (-1.0, 1.0)
    rounds_probabilities: bool = False
    elements: int = 0
    steps: list[tuple[str, Any, Tensor]] = field(default_factory=list)

    max_operations = 5e10  # in multiply-adds of one image: some seconds
    max_elements = MAX_ELEMENTS  # of all tensors together, which the framework may keep
    pool_operations = 1  # what an output of a pool takes for each element of its window
    column_operations = 0  # and of a convolution, beside its multiply-adds, for each element that it adds up

    def start(self) -> str:
        """Load the framework; its name and version. NotComparedError where it is not installed."""
        raise NotImplementedError

    def run(self, inputs: Sequence[Array], key: Any = None) -> Array:
        """What the source gives for `batch` images, an array for each input; or what its node `key` gives."""
        raise NotImplementedError

    def scores(self, batch: Array, key: Any = None) -> Array:
        """For each of a batch (N, C, H, W) of the network's own inputs, as (N, elements)."""
        indices, dtypes = [x.indices() for x in self.inputs], self.dtypes or [self.dtype] * len(self.inputs)
        made = [self.run([np.repeat(image[index][None].astype(dtype), self.batch, 0)
                          for index, dtype in zip(indices, dtypes, strict=True)], key)
                for image in batch.reshape(len(batch), -1)]
        return np.stack([np.asarray(each, np.float64).reshape(self.batch, -1)[0] for each in made])


def verified(model: Model, name: str, runtime: Runtime | None, is_required: bool) -> Model:
    """`model` with what verified it in its provenance; as it is where nothing could be compared.

    is_required : whether that is an error, and not a line in the log

    Raises
    ------
    ConversionError
        Scores that differ, or, if it is required, what keeps them from being compared.
    """
    try:
        if runtime is None:
            raise NotComparedError("there is no runtime here for files of this kind")
        framework = _compared(model, runtime)
    except NotComparedError as reason:
        if is_required:
            raise ConversionError(f"its scores cannot be compared with its source's: {reason}") from None
        _LOG.warning("%s: converted, but its scores were compared with nothing: %s", name, reason)
        return model
    return dataclasses.replace(model, provenance={**model.provenance, "verified": framework})


def _compared(model: Model, runtime: Runtime) -> str:
    """The framework that gives the same scores."""
    graph = model.graph
    framework = runtime.start()
    count = _operations(graph, runtime)
    if count > runtime.max_operations:
        raise NotComparedError(f"an image takes {count:.1e} multiply-adds, and {framework} is given at most "
                               f"{runtime.max_operations:.0e}")
    elements = max(runtime.elements, runtime.batch * cost(graph).activation_bytes // 4)
    if elements > runtime.max_elements:
        raise NotComparedError(f"its nodes make {elements} elements for {runtime.batch} images, and at most "
                               f"{runtime.max_elements} are computed to compare them")
    batch = _random_inputs(graph, runtime)
    try:
        with np.errstate(all="ignore"):
            theirs = runtime.scores(batch)
    except Exception as error:  # frameworks have many kinds of errors, and none in common
        raise NotComparedError(f"{framework} cannot run it: {_first_line(error)}") from error
    if theirs.shape[1] != graph.outputs:
        raise ConversionError(f"{framework} gives {theirs.shape[1]} scores, and the converted network {graph.outputs}; "
                              f"{_ADVICE}")
    with np.errstate(all="ignore"):
        ours, theirs = _alike(_own_scores(graph, batch), theirs, graph.output, runtime)
    if not np.isfinite(theirs).all():
        raise NotComparedError(f"{framework} gives scores for random inputs that are not finite")
    least = 1.0 if runtime.builder.ending else 0.0  # probabilities are compared by their logarithms
    if _difference(ours, theirs, least) > runtime.tolerance:
        _refuse(model, runtime, framework, batch, ours, theirs)
    return framework


def _refuse(model: Model, runtime: Runtime, framework: str, batch: Array, ours: Array, theirs: Array) -> NoReturn:
    with np.errstate(invalid="ignore"):
        off = np.abs(ours - theirs)
    image, output = np.unravel_index(np.argmax(np.where(np.isnan(off), np.inf, off)), off.shape)
    is_named = model.classes and not model.graph.has_maps
    called = f"{output} ({model.class_name(int(output))!r})" if is_named else str(output)
    ending = runtime.builder.ending
    of = "" if ending is None else ", before its sigmoid," if ending.kind == "sigmoid" else (
        ", the logarithm of its softmax,")
    first = _first_that_differs(runtime, model.graph, batch)
    raise ConversionError(
        f"for a random input, output {called}{of} is {ours[image, output]:.6g}, and {framework} gives "
        f"{theirs[image, output]:.6g}; required: a difference of at most {runtime.tolerance:.1g} of the largest, "
        f"{np.abs(theirs).max():.6g}. {first}{_ADVICE[0].upper()}{_ADVICE[1:]}")


_ADVICE = "please report this network; verify=False (--no-verify) converts it all the same"


def _difference(ours: Array, theirs: Array, least: float) -> float:
    """The largest, relative to the largest value, or to `least`; infinite where ours are not finite."""
    if not np.isfinite(ours).all():
        return math.inf
    largest = max(float(np.abs(ours).max()), float(np.abs(theirs).max()), least)
    return float(np.abs(ours - theirs).max()) / largest if largest else 0.0


def _alike(ours: Array, theirs: Array, last: str, runtime: Runtime) -> tuple[Array, Array]:
    """Scores in the source's order, as they are; or, of a source that ends in probabilities, whose scores the
    conversion keeps, both as logits or logarithms, or as probabilities. last: the converted network's last layer."""
    ending, view = runtime.builder.ending, runtime.builder.output
    assert view is not None
    order = view.indices().ravel()  # of the source's elements, in the layer that has its scores
    if view.layer == last:
        ours = ours[:, order]
    if ending is None:
        return ours, theirs
    if ending.kind == "sigmoid" and not runtime.rounds_probabilities:  # whose logits float32 knows in the middle
        theirs = np.clip(theirs, 0, 1)
        return np.clip(ours, -_MOST_LOGIT, _MOST_LOGIT), np.clip(np.log(theirs) - np.log1p(-theirs), -_MOST_LOGIT,
                                                                 _MOST_LOGIT)
    if ending.kind == "sigmoid":
        ours = -np.logaddexp(0, -ours)
    else:
        values = np.full((len(ours), math.prod(view.shape)), np.nan)  # of which the softmax is needed whole
        values[:, order] = ours
        along, axis = ending.of.indices(), ending.axis + 1
        logits = values[:, along]
        logits -= logits.max(axis, keepdims=True)
        values[:, along] = logits - np.log(np.exp(logits).sum(axis, keepdims=True))
        ours = values[:, order]
    if ending.kind != "log_softmax":
        if runtime.rounds_probabilities:
            return np.exp(ours), theirs
        theirs = np.log(theirs)
    least = np.log(_LEAST_PROBABILITY)
    return np.maximum(ours, least), np.maximum(theirs, least)


def _random_inputs(graph: Graph, runtime: Runtime) -> Array:
    """Two, inside the value box, and whole where the source's are."""
    size = math.prod(graph.input_shape)
    is_whole = np.full(size, np.dtype(runtime.dtype).kind in "iub")
    for x, dtype in zip(runtime.inputs, runtime.dtypes, strict=False):
        is_whole[x.indices().ravel()] = np.dtype(dtype).kind in "iub"
    is_whole = is_whole.reshape(graph.input_shape)
    low, high = (np.where(is_whole, whole, bound) for whole, bound in zip((0.0, 255.0), runtime.bounds, strict=True))
    bounds = (low, high) if graph.box is None else tuple(bound[:, None, None] for bound in graph.box)
    random = np.random.default_rng(0).random((2, *graph.input_shape))
    batch = np.asarray(bounds[0] + (bounds[1] - bounds[0]) * random, np.float32)
    return np.where(is_whole, np.trunc(batch), batch)


def _own_scores(graph: Graph, batch: Array) -> Array:
    from fastdtd.explainer import Explainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scores that are not positive
        try:  # what is not finite is an error
            explainer = Explainer(Model(graph, Preprocessing(None)), memory=MEMORY)
            return np.asarray(explainer(batch, 0).output, np.float64).reshape(len(batch), -1)
        except FastDTDError as error:
            raise NotComparedError(str(error)) from error


def _operations(graph: Graph, runtime: Runtime) -> int:
    """What the runtime takes for one image, in multiply-adds."""
    total = 0
    for layer in graph:
        count = multiply_adds(layer, graph)
        if isinstance(layer, Conv2d):
            count += count // layer.weight.shape[1] * runtime.column_operations
        total += count * (runtime.pool_operations if isinstance(layer, Pool2d) else 1)
    return total


def _first_that_differs(runtime: Runtime, graph: Graph, batch: Array) -> str:
    """A sentence that names the first node of the source whose values differ, by bisection; nothing where it is not
    found."""
    made = {INPUT, *runtime.builder.layers}  # without what was left out at the end
    steps = [step for step in runtime.steps if step[2].layer in made]
    first, last = 0, len(steps) - 1
    try:
        if not steps or not _differs(runtime, graph, batch, steps[last]):
            return ""
        while first < last:
            middle = (first + last) // 2
            if _differs(runtime, graph, batch, steps[middle]):
                last = middle
            else:
                first = middle + 1
    except Exception:  # of the framework, or of a network that is cut off: the scores differ all the same
        return ""
    return f"What differs first is {steps[first][0]}. "


def _differs(runtime: Runtime, graph: Graph, batch: Array, step: tuple[str, Any, Tensor]) -> bool:
    _, key, value = step
    flat = runtime.builder.with_dims(value, (value.elements,))
    layers = runtime.builder.leading_to(flat)
    theirs = runtime.scores(batch, key)
    if not layers:  # the input itself, moved
        ours = batch.reshape(len(batch), -1).astype(np.float64)
    else:
        ours = _own_scores(Graph(tuple(layers), graph.input_shape, graph.box), batch)
    return ours.shape != theirs.shape or _difference(ours, theirs, 0.0) > runtime.tolerance


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
