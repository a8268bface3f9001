"""Explainer: images in, relevance out."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd import devices
from fastdtd.cost import MAX_MULTIPLY_ADDS, cost
from fastdtd.errors import InputError, out_of_memory, shown
from fastdtd.executor import Executor
from fastdtd.explanation import Context, Explanation
from fastdtd.graph import Array
from fastdtd.inputs import (
    Against,
    BeyondFloat32Error,
    ExplanationWarning,
    MapTarget,
    against_text,
    checked_against,
    checked_images,
    checked_places,
    checked_start,
    checked_targets,
    checked_through,
    factors,
    joined,
    memory_size,
    pictures_of,
)
from fastdtd.lowering.aliasing import fused_activations
from fastdtd.model import Model
from fastdtd.plan import OutOfMemoryError, Plan
from fastdtd.question import Beginning, Question
from fastdtd.rules import Rules, assign

# What of an image's relevance may be lost to rounding: a thousand times what is, 1e-6, without numbers below float32's
# range; and with the 11 bits of a factor on tensor cores.
_LARGEST_LOSS, _LARGEST_LOSS_TF32 = 1e-3, 1e-2
MAX_THREADS = 1024
_ADVICE = "fewer images at a time, fewer threads or memory= (--memory SIZE) take less"


class Explainer:
    """Explains a model's predictions by deep Taylor decomposition.

    Weights are packed when it is made, so make it once and call it often; calls from several threads are safe.

    Parameters
    ----------
    model : Model
        From `fastdtd.load` or `fastdtd.convert`.
    rules : str, mapping of str to str or Rule, or sequence of these
        See `fastdtd.rules.assign`: "dtd" is the method as published, each layer's rule following from its input domain.
    device : str
        "cpu"; "cuda": all GPUs that CUDA shows, which share out the images of a call; "cuda:1": one of them; "auto":
        "cuda" where that works, else "cpu". GPUs need ``pip install "fastdtd[cuda]"``.
    threads : int or None
        At most 1024. None: as many as this process may use. However many callers there are, no more threads than these
        compute at a time; but with one, each call is computed by the thread that makes it. On GPUs those that read and
        write pictures for ``fastdtd explain``.
    memory : str, int or None
        The most memory that activations, ratios and scratch may take (on each GPU), of all calls together and of what
        is kept for the next: a text such as "2GiB" (or KiB, MiB, KB, MB, GB) or a number of bytes. With less, fewer
        images are explained at a time, and if need be all threads work on one; the results are the same bits. Weights,
        images and explanations are not counted. None: whatever is fastest, which is at most 256 MiB, or one image, for
        each thread; of a GPU at most 80 % of what is free.
    precision : str or None
        How GPUs multiply in convolutions: "tf32", on tensor cores, with 11 bits of each factor; "3xtf32", on tensor
        cores with float32's accuracy; "fp32", without tensor cores. None: "tf32" where the chip has it.
    max_multiply_adds : float
        A network of which one image takes more is refused: model files come from anywhere, and a small one can ask for
        hours. VGG-16 takes 3.1e10; ``fastdtd show`` says it of a model file.

    Attributes
    ----------
    model : Model
    rules : mapping of str to LayerRule
        Of each layer that redistributes relevance.
    context : Context
        What its explanations know of the network.
    batch : int
        Images that a thread (on GPUs: a stream), or all threads where they must share one image's memory, take at a
        time. It is halved when a GPU has no memory left for as many.
    at_once : int
        Images that all threads, or the streams of all GPUs, take together.
    precision : str
        What GPUs compute with; "" on processors.

    Raises
    ------
    RuleError
        A rule that does not exist or does not fit.
    InputError
        No model, an unknown device, a number of threads below 1 or above 1024, a limit of memory that is none, or in
        which not one image can be explained, or a network that takes too many multiply-adds.
    DeviceError
        A GPU that cannot be used: what is missing or does not fit, and what to do.

    Examples
    --------
    >>> import fastdtd
    >>> explainer = fastdtd.Explainer(fastdtd.load("squeezenet1_1"))
    >>> explainer("cat.jpg").class_name()
    'Egyptian cat'
    >>> explainer(["cat.jpg", "coffee.jpg"], target="espresso").relevance.shape
    (2, 3, 227, 227)

    References
    ----------
    Montavon, Lapuschkin, Binder, Samek, Müller: Explaining NonLinear Classification Decisions with Deep Taylor
    Decomposition. Pattern Recognition 65:211-222, 2017.
    """

    @out_of_memory(OutOfMemoryError, _ADVICE)
    def __init__(self, model: Model, rules: Rules = "dtd", device: str = "cpu", threads: int | None = None,
                 memory: str | int | None = None, precision: str | None = None,
                 max_multiply_adds: float = MAX_MULTIPLY_ADDS) -> None:
        if not isinstance(model, Model):
            raise InputError(f"the model is {shown(model)}, of type {type(model).__name__}; required: a Model, as "
                             "fastdtd.load(...) and fastdtd.convert(...) return it")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, (int, np.integer))
                                    or not 1 <= threads <= MAX_THREADS):
            raise InputError(
                f"threads is {shown(threads)}; required: a whole number from 1 to {MAX_THREADS}, or None for all "
                "processors")
        limit = math.inf if memory is None else memory_size(memory)
        if isinstance(max_multiply_adds, bool) or not isinstance(max_multiply_adds, (int, float)):
            raise InputError(f"max_multiply_adds is {shown(max_multiply_adds)}; required: a number")
        count = cost(model.graph).multiply_adds
        if not count <= max_multiply_adds:
            raise InputError(
                f"an image takes {count:.2e} multiply-adds, and {max_multiply_adds:.2g} are accepted; required: a "
                "network that takes fewer, or a higher max_multiply_adds (--max-multiply-adds)")
        self.model = model
        self._arguments = model, rules, device, threads, memory, precision, max_multiply_adds
        self._assignment = assign(model.graph, rules)
        self.rules = self._assignment.rules
        rules_as_text = {name: str(rule.rule) for name, rule in self.rules.items()}
        self.context = Context(model.classes, rules_as_text, model.preprocessing.resize, inputs=model.inputs)
        self.threads = int(threads or min(usable_processors(), MAX_THREADS))
        found = devices.find(device, precision)
        self.precision, self._kernels = found.precision, found.kernels
        self._largest_loss = _LARGEST_LOSS_TF32 if self.precision == "tf32" else _LARGEST_LOSS
        channels, most = model.graph.input_shape[0], np.finfo(np.float32).max
        low, high = (np.full(channels, bound, np.float32) for bound in model.graph.box or (-most, most))
        self._surely_within = partial(self._kernels.surely_within, low, high)
        self._executor = Executor(model.graph, self._assignment, found, self.threads, limit, memory)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is what it was made of; where it is unpickled, weights are packed again."""
        return Explainer, self._arguments

    @property
    def conserves(self) -> bool:
        """Whether relevance, with what layers absorb, sums to what is explained; derivatives do not."""
        return not self._assignment.derivative

    @property
    def batch(self) -> int:
        return self._executor.batch

    @property
    def at_once(self) -> int:
        return self._executor.at_once

    def __repr__(self) -> str:
        where = f"GPUs in {self.precision}" if self.precision else f"{self.threads} threads"
        return f"<Explainer of {self.model.graph!r}: rules for {len(self.rules)} of them, on {where}>"

    @out_of_memory(OutOfMemoryError, _ADVICE)
    def __call__(self, batch: Any, target: MapTarget = None, start: npt.ArrayLike | None = None, *,
                 against: Against = None, through: Mapping[str, int | Sequence[int]] | None = None) -> Explanation:
        """Explain each image of a batch.

        Parameters
        ----------
        batch : picture, sequence of pictures, (N, C, H, W) or (C, H, W) array, or mapping from str to array
            Of a network with several inputs (`Model.inputs`) an array for each, by name. A picture is a path, a PIL
            image or a uint8 array of pixels (H, W, 3), and is preprocessed by the model. An array is what
            `model.preprocess` makes; values beyond the model's value box are clipped to it, with a warning. With
            device="cuda" it may be an array of CuPy on one of the explainer's GPUs; it is explained there, and
            relevance and output stay there.
        target : int, str, tuple, sequence of these, or None
            The output to explain: its number or class name, one for all or one for each image. None: the one with the
            highest score. Of a network whose outputs are maps, of segmentation or detection, it is the scores of one
            channel, which are explained together: all of them, or with where in the map

            - ``(channel, y, x)``: the score at one position;
            - ``(channel, "max")``: the highest one;
            - ``(channel, mask)``: those where a mask (H, W) is true.

            There, only a list has one for each image, and None is the highest score at any position of any channel.
        start : (N, K) or (K,) array (of maps: (N, K, H, W) or (K, H, W)), or None
            Instead of a target: the relevance that each output starts with, negative only under rules that decompose
            negative scores (`Explanation.explained`). Its largest in size is the `target` of the explanation, and its
            sum what is `explained`.
        against : int, str, sequence of these, or None
            What the target is held against: the explanation is the target's less that of these, in one backward pass,
            and its relevance has both signs. A class, or several, whose mean it is, for all images; or

            - "runner-up": the class with the highest score but the target;
            - "others": all other classes, which share the target's score evenly (CLRP1 of Gu et al. 2018);
            - "softmax-gradient": the outputs start with the softmax's derivative by them, y_t (1 - y_t) the target and
              -y_t y_k the others (SGLRP of Iwana et al. 2019).

            docs/method.md says what the sums are. A class of such a name is given by its number. Of maps, each position
            is held against the same position of other channels.
        through : mapping from str to int or sequence of int, or None
            Layers, and channels of what they make: of the relevance that comes to such a layer only that of these
            channels goes on. The rest is the explanation's `cut`. Relevance that goes around the layer stays.

        Returns
        -------
        Explanation

        Raises
        ------
        PictureError
            A picture that cannot be read.
        InputError
            A batch of another shape, of no numbers, or with NaN or infinity; a target that the model does not have; a
            start of another shape, negative where it may not be, beside a target, or at an output whose score is zero;
            scores or relevance beyond float32, or relevance lost below its range; `against` beside a start, under
            derivatives, or for a network of one output; a layer or channel of `through` that is none.
        DeviceError
            It was made for GPUs before the process was forked.

        Warns
        -----
        ExplanationWarning
            Values were clipped, or a target's score is not positive, where rules decompose positive ones alone; or
            all that it is held against.
        """
        batch, pictures = self._preprocessed(batch)
        graph, kernels, derivative = self.model.graph, self._kernels, self._assignment.derivative
        library = kernels.namespace(batch)
        with kernels.on_device_of(batch):
            images = checked_images(batch, self.model, library, self._surely_within)
            count, shape = len(images), graph.output_shape
            is_of_maps = graph.has_maps
            targets, places = (checked_places(target, self.model, count) if is_of_maps else
                               (checked_targets(target, self.model, count), None))
            signed = self._assignment.signed_scores
            held = checked_against(against, self.model, self.conserves)
            if held is not None and start is not None:
                raise InputError("a start and classes to hold it against were given; required: one or the other; where "
                                 "rules decompose negative scores, a start may be negative")
            question = Question(shape, targets, places, checked_start(start, target, count, shape, signed), held,
                                signed, checked_through(through, self.model, self.conserves))
            explained_targets = np.empty(count, np.int64)
            context = replace(self.context, pictures=pictures, against=against_text(held, self.model),
                              explain_again=partial(self._observed, images, explained_targets, question))
            ledger = np.zeros((len(self._assignment.absorbers), count))
            e = Explanation(library.empty_like(images),
                            library.empty((count, *(shape if is_of_maps else shape[:1])), np.float32),
                            explained_targets, np.empty(count, np.float32),
                            dict(zip(self._assignment.absorbers, ledger, strict=True)), context,
                            {name: np.zeros(count) for name, _ in question.through},
                            np.empty((count, *shape[1:]), np.bool_) if is_of_maps else None)
        output = e.output.reshape(count, -1) if is_of_maps else e.output
        sums, doubtful = np.zeros(count), list[slice]()

        def explain(plan: Plan, first: int, last: int) -> None:
            part = slice(first, last)
            scores, began, e.explained[part] = self._run(plan, images[part], question.part(part), first)
            output[part], e.target[part] = library.asarray(scores), began.targets
            if e.region is not None:
                e.region[part] = began.region
            relevance = e.relevance[part]
            kernels.read(relevance, plan.relevance)
            match derivative:
                case "gradient*input":
                    relevance *= images[part]
                case "sensitivity":
                    relevance **= 2
            kernels.read(ledger[:, part], plan.ledger.T)
            for name, channels in question.through:
                came = np.empty(plan.came[name].shape, np.float32)
                kernels.read(came, plan.came[name])
                e.cut[name][part] = np.delete(came, channels, 1).sum((1, 2, 3), dtype=np.float64)
            if not kernels.sum_relevance(sums[part], relevance, output[part], plan.ledger, e.explained[part],
                                         self._largest_loss) or derivative or question.is_special:
                doubtful.append(part)

        self._executor.map(explain, count, self._executor.devices_for(images), question.mixes_signs,
                           question.through)
        if doubtful:
            finite = np.empty(count, np.bool_)  # scores
            with kernels.on_device_of(batch):
                kernels.read(finite, library.isfinite(output).all(1))
            self._examine(e, sums, finite & np.isfinite(sums), question)
        return e

    @out_of_memory(OutOfMemoryError, _ADVICE)
    def predict(self, batch: Any) -> Array:
        """Class scores alone, by the forward pass: what an explanation has as `output`.

        Parameters
        ----------
        batch : picture, sequence of pictures, or (N, C, H, W) or (C, H, W) array
            As it is explained.

        Returns
        -------
        (N, K) or (N, K, H, W) float32
            Before any softmax; the same bits as the explanation's. Of CuPy where the batch is.

        Raises
        ------
        PictureError, InputError, DeviceError
            As an explanation of the batch does; of what float32 cannot hold, for scores alone.

        Warns
        -----
        ExplanationWarning
            Values were clipped to the model's value box.

        Examples
        --------
        >>> import fastdtd
        >>> explainer = fastdtd.Explainer(fastdtd.load("squeezenet1_1"))
        >>> explainer.predict(["cat.jpg", "coffee.jpg"]).argmax(1)
        array([285, 967])
        """
        batch, _ = self._preprocessed(batch)
        graph, kernels = self.model.graph, self._kernels
        library = kernels.namespace(batch)
        with kernels.on_device_of(batch):
            images = checked_images(batch, self.model, library, self._surely_within)
            scores: Array = library.empty((len(images), graph.outputs), np.float32)

        def predict(plan: Plan, first: int, last: int) -> None:
            kernels.write(plan.input, images[first:last])
            plan.forward(self._executor.submit(plan))
            kernels.read(scores[first:last], plan.output)

        self._executor.map(predict, len(images), self._executor.devices_for(images))
        with kernels.on_device_of(batch):
            beyond = library.flatnonzero(~library.isfinite(scores).all(1)).tolist()
        if beyond:
            raise BeyondFloat32Error(dict.fromkeys(
                beyond, "gives scores beyond float32; its values or the model's weights are too large"))
        return scores.reshape(-1, *graph.output_shape) if graph.has_maps else scores

    def _preprocessed(self, batch: Any) -> tuple[Any, list[Any] | None]:
        """The network's inputs, and the pictures that they are of, where pictures were given."""
        if isinstance(batch, Mapping):
            first = next(iter(batch.values()), None)
            return joined(batch, self.model, self._kernels.namespace(first)), None
        pictures = pictures_of(batch, self.model)
        if pictures is None:
            return batch, None
        return np.stack([self.model.preprocess(picture) for picture in pictures]), pictures

    def _examine(self, e: Explanation, sums: npt.NDArray[np.float64], finite: npt.NDArray[np.bool_],
                 question: Question) -> None:
        """Refuse what float32 cannot hold, and explanations of which numbers below its range took a part away that no
        layer absorbed; warn of targets that have nothing to decompose, and of those that are held against nothing."""
        if not finite.all():
            raise BeyondFloat32Error(dict.fromkeys(
                np.flatnonzero(~finite).tolist(),
                "gives scores or relevance beyond float32; its values or the model's weights are too large"))
        if self._assignment.derivative:
            return
        scores = np.empty((len(e), self.model.graph.outputs), np.float32)
        self._kernels.read(scores, e.output.reshape(scores.shape))
        targets, start, region = question.of(scores)
        cut = np.asarray(sum(e.cut.values(), np.zeros(len(e))))
        lost = np.abs(e.explained - sums - e.absorbed - cut)
        reasons = {}
        for i in np.flatnonzero(lost > self._largest_loss * np.abs(e.explained)):
            # Under rules that give back negative relevance, too, what is explained may be small beside it.
            turnover = float(abs(e.relevance[i]).sum(dtype=np.float64)) + sum(abs(of[i]) for of in e.ledger.values())
            turnover = max(turnover, abs(cut[i]))
            if start is not None:
                turnover = max(turnover, float(np.abs(start[i]).sum()))
            if lost[i] > self._largest_loss * max(abs(float(e.explained[i])), turnover):
                reasons[int(i)] = (
                    f"loses {lost[i]:.3g} of {float(e.explained[i]):.3g} in numbers below float32's range; its values "
                    "or the model's weights are too small")
        if reasons:
            raise BeyondFloat32Error(reasons)
        if question.start is not None:
            return
        if region is None:
            of_targets = scores[np.arange(len(e)), targets]
        else:  # the one that has most to decompose
            of_targets = scores.reshape(-1, *question.shape)[np.arange(len(e)), targets]
            of_targets = np.where(region, np.abs(of_targets) if question.signed else of_targets, -np.inf).max((1, 2))
        nothing = np.flatnonzero(of_targets == 0 if question.signed else of_targets <= 0)
        what = "of zero" if question.signed else "that is not positive"
        if len(nothing) and question.against != "softmax-gradient":
            image = nothing[0]
            zero = "" if start is not None else " and the relevance is zero"
            warnings.warn(
                f"{len(nothing)} of {len(e)} targets have a score {what}, so there is nothing to decompose{zero}; the "
                f"first is image {image}, {e.class_name(image)!r}, score {of_targets[image]:.4g}", ExplanationWarning,
                stacklevel=4)  # past __call__ and out_of_memory
        if question.against is not None and start is not None and len(alone := np.flatnonzero((start >= 0).all(1))):
            warnings.warn(
                f"nothing is held against the targets of {len(alone)} of {len(e)} images, for all that was given has a "
                f"score {what}, or is the target itself; the first is image {alone[0]}, held against "
                f"{e.against_name(alone[0])!r}", ExplanationWarning, stacklevel=4)

    def _run(self, plan: Plan, images: Array, question: Question, first: int) -> tuple[Array, Beginning, Array]:
        """Both passes: scores, what is explained of each image, and how much; first: the first image's number."""
        scores = np.empty(plan.output.shape, np.float32)
        began: list[tuple[Beginning, Array]] = []

        def begin() -> None:
            self._kernels.read(scores, plan.output)
            began.append(self._begin(plan, scores, question, first))

        self._kernels.write(plan.input, images)
        plan.explain(begin, self._executor.submit(plan))
        return scores, *began[0]

    def _begin(self, plan: Plan, scores: Array, question: Question, first: int) -> tuple[Beginning, Array]:
        """Write what the backward pass starts with."""
        began, derivative = question.of(scores), self._assignment.derivative
        if began.start is None:
            start, explained = np.zeros(scores.shape, np.float32), np.empty(len(scores), np.float32)
            starts_with_relevance = plan.schedule.starts_with_relevance
            for i, output in enumerate(began.targets.tolist()):  # sooner than by NumPy's indices, if there are few
                score = scores[i, output]
                explained[i] = score if question.signed else max(score, 0)
                start[i, output] = 1 if derivative else explained[i] if starts_with_relevance else np.sign(explained[i])
        else:
            start, explained = began.start, began.start.sum(1, dtype=np.float64).astype(np.float32)
            if derivative and question.start is None:  # of a part of a map
                assert began.region is not None
                start = np.zeros((len(scores), *question.shape), np.float32)
                start[np.arange(len(scores)), began.targets] = began.region
                start = start.reshape(scores.shape)
            elif not plan.schedule.starts_with_relevance:
                start = factors(start, scores, first)
        self._kernels.write(plan.start, start)
        return began, explained

    @out_of_memory(OutOfMemoryError, _ADVICE)
    def _observed(self, images: Array, targets: npt.NDArray[np.int64], question: Question, layers: Sequence[str]
                  ) -> dict[str, Array]:
        """Relevance of some tensors, one image after the other: a plan that keeps it is large."""
        graph = self.model.graph
        for name in layers:
            if not isinstance(name, str) or name not in graph.shapes:
                raise InputError(f"the network has no layer {shown(name)}; it has {', '.join(graph.shapes)}")
            if self._assignment.derivative and (after := fused_activations(graph).get(name)):
                raise InputError(
                    f"the derivative by what layer {name!r} makes is not kept, for the activation after it is computed "
                    f"with it; required: a layer such as {after.name!r}")
        library = self._kernels.namespace(images)
        with self._kernels.on_device_of(images):
            found = {name: library.empty((len(images), *graph.shapes[name]), np.float32) for name in layers}

        again = replace(question, targets=targets)

        def explain(plan: Plan) -> None:
            for i in range(len(images)):
                part = slice(i, i + 1)
                self._run(plan, images[part], again.part(part), i)
                for name, relevance in plan.observed.items():
                    self._kernels.read(found[name][part], relevance)

        self._executor.observe(explain, layers, self._executor.devices_for(images)[0], question.mixes_signs,
                               question.through)
        return found


def usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
