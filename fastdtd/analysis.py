"""Heatmaps of a run compared with one another, class by class, for ViRelAy: spectral relevance analysis (SpRAy,
Lapuschkin et al. 2019).

ViRelAy's project needs the images, names of classes and an analysis beside attribution.h5; its row i is image i and
heatmap i. docs/howto-many-pictures.md says what is in each file.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd import results
from fastdtd.errors import InputError, OutputError, PictureError, printable, shown
from fastdtd.explainer import usable_processors
from fastdtd.files import as_path, remove_abandoned, replace
from fastdtd.graph import Array

ANALYSIS, INPUT, LABEL_MAP, PROJECT = "analysis.h5", "input.h5", "label-map.json", "project.yaml"
BY = ("target", "predicted", "label")
_WRITTEN = r"analysis\.h5|input\.h5|label-map\.json|project\.yaml"
_SIDE = 32  # of a reduced heatmap; Lapuschkin et al. take 20
_MOST = 5_000  # heatmaps of a class that are compared: eigenvectors of long chains take the square of it
_DIMENSIONS = 8  # of an embedding, at most: with them k-means finds up to 9 clusters
_CLUSTERS = range(2, 9)
_NEIGHBORS = 10  # of each, or a third of a small class, in which all would be neighbours
_COMPONENTS = 32  # principal ones, in which neighbours are looked for
_EIGENVALUES = 16  # that are shown: as many clusters stand out as there are small ones before a gap
_DENSE = 256  # heatmaps of a class, up to which all eigenvalues are computed
_BLOCK_BYTES = 1 << 25  # of relevance or images at a time
_GRAY = 127
_SEED = 0


@dataclass
class Analysis:
    """What `analyze` made.

    Attributes
    ----------
    project : Path
        ViRelAy's project file.
    classes, rows : int
        How many classes there are, and heatmaps in them.
    left_out : int
        Heatmaps that are in no class: of images without a true label, and above 5,000 of a class.
    failed : list of (str, str)
        Name and reason of each image that could not be read again, and is gray in input.h5.
    """

    project: Path
    classes: int = 0
    rows: int = 0
    left_out: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def analyze(out: str | os.PathLike[str], by: str = "target",
            on_progress: Callable[[str, int, int], Any] = lambda stage, done, total: None) -> Analysis:
    """Compare the heatmaps of a finished run with one another, and write what ViRelAy opens: ``virelay
    OUT/project.yaml``.

    Heatmaps of a class are summed over channels, reduced to 32 x 32 by averaging and scaled to unit length. They are
    embedded by principal components, and by eigenvectors of the graph of nearest neighbours (spectral embedding), which
    k-means then clusters, for 2 to 8 clusters. The same run gives the same files.

    Parameters
    ----------
    out : path
        The output folder of `fastdtd explain`, which gets analysis.h5, input.h5, label-map.json and project.yaml.
    by : str
        Which heatmaps are a class: those that explain it ("target"), of images for which the network predicts it
        ("predicted"), or whose true label it is ("label").
    on_progress : callable
        Told of a stage, "heatmaps", "classes" or "images", how much of how much of it is done.

    Returns
    -------
    Analysis

    Raises
    ------
    OutputError
        No run, an unfinished one, or one that did not keep relevance; the folder cannot be written, or another process
        writes to it.
    InputError
        An unknown `by`; no image has a true label; or scikit-learn is missing.

    Examples
    --------
    >>> import fastdtd
    >>> from fastdtd import cli
    >>> cli.main(["explain", "squeezenet1_1", "cat.jpg", "coffee.jpg", "-o", "out"])    # or in a shell
    cat.jpg  ...
    2 explained; see out/
    0
    >>> made = fastdtd.analyze("out")
    >>> made.rows, made.classes, made.project.name
    (2, 2, 'project.yaml')
    """
    place = as_path(out, OutputError, "the output folder of a run")
    if by not in BY:
        raise InputError(f"heatmaps are to be compared by {shown(by)}; required: one of {', '.join(BY)}")
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise InputError("an analysis needs the package scikit-learn; required: pip install \"fastdtd[analysis]\""
                         ) from None
    run = results.open_results(place)
    run[:0]  # an error where relevance was not kept
    if not len(run):
        raise OutputError(f"{str(place)!r} has no heatmap: all {len(run.failed)} images failed")
    digest, names = _result(place, len(run))
    if not names:
        names = [f"class {number}" for number in range(run.manifest["model"]["outputs"])]
    numbers = run.columns["prediction"].argmax(1) if by == "predicted" else run.columns[by]
    classes = {number: _spread(np.flatnonzero(numbers == number)) for number in np.unique(numbers).tolist()
               if number >= 0}
    if not classes:
        raise InputError(f"no image of {str(place)!r} has a true label that the model knows; required: a set with "
                         f"labels, or an analysis by {BY[0]} or {BY[1]}")
    made = Analysis(place / PROJECT, len(classes), sum(map(len, classes.values())))
    made.left_out = len(run) - made.rows
    digits = len(str(len(names) - 1))
    with results.added_to(place, "another process"):
        remove_abandoned(place, _WRITTEN)
        replace(place / ANALYSIS, lambda path: _write_analysis(path, run, classes, digits, on_progress))
        replace(place / LABEL_MAP, lambda path: path.write_text(_label_map(names, digits)))
        made.failed = _write_input(place, run, digest, on_progress)
        strategy = "true_label" if run.manifest["target"] == "true label" else "predicted_label"
        replace(place / PROJECT, lambda path: path.write_text(_project(place, run, strategy), encoding="utf-8"))
    return made


@contextlib.contextmanager
def _hdf5_with_room(path: Path, nbytes: int) -> Iterator[Any]:
    """A new HDF5 file in place of an empty one, which has room for `nbytes`; in the end it has the size that it needs.
    """
    import h5py

    content = io.BytesIO()
    with h5py.File(content, "w"):
        pass
    results.take_space(path, content.getbuffer(), nbytes)
    with h5py.File(path, "r+", locking=False) as file:
        yield file
        file.flush()
        size = file.id.get_filesize()
    os.truncate(path, size)


def _result(place: Path, rows: int) -> tuple[str, list[str]]:
    """What attribution.h5 says of its shards, and the names of classes."""
    import h5py

    path = place / results.RESULT
    try:
        with h5py.File(path, "r", locking=False) as file:
            if len(file["image"]) == rows:
                return file.attrs["shards"], file["classes"].asstr()[...].tolist() if "classes" in file else []
            trouble = f"has {len(file['image'])} rows of {rows}"
    except (OSError, LookupError, RuntimeError, TypeError) as error:
        trouble = f"cannot be read ({error})"
    raise OutputError(f"{str(path)!r} {trouble}; start the same run again, which makes it")


def _rows_at_a_time(nbytes: int) -> int:
    """Rows of so many bytes each."""
    return max(1, _BLOCK_BYTES // nbytes)


def _spread(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """At most _MOST of them, evenly spread."""
    return rows if len(rows) <= _MOST else rows[np.linspace(0, len(rows) - 1, _MOST).astype(np.int64)]


# ---- Heatmaps --------------------------------------------------------------------------------------------------------


def _write_analysis(path: Path, run: results.Results, classes: dict[int, npt.NDArray[np.int64]], digits: int,
                    on_progress: Callable[[str, int, int], Any]) -> None:
    import sklearn.cluster  # noqa: F401  # loads what threads are limited of
    from threadpoolctl import threadpool_limits

    row_bytes = 4 * (1 + 2 * _DIMENSIONS + len(_CLUSTERS))
    with tempfile.TemporaryFile(dir=path.parent) as scratch:
        step = _rows_at_a_time(4 * math.prod(run[:0].shape[1:]))
        for first in range(0, len(run), step):
            small = _reduced(run[first:first + step])
            scratch.write(small.tobytes())
            on_progress("heatmaps", first + len(small), len(run))
        scratch.flush()
        heatmaps = np.memmap(scratch, np.float32, "r", shape=(len(run), small.shape[1]))
        # With one thread sums have one order, and small classes do not wait for threads.
        nbytes = row_bytes * len(run) + (1 << 15) * len(classes)
        with threadpool_limits(1), _hdf5_with_room(path, nbytes) as file:
            for done, (number, rows) in enumerate(classes.items(), 1):
                # ViRelAy takes the names of embeddings and clusterings from the first class: all have the same.
                group = f"{number:0{digits}}"
                results.put(file, f"{group}/index", rows.astype(np.uint32))
                embeddings = _embeddings(heatmaps[rows])
                for name, (points, eigenvalues) in embeddings.items():
                    results.put(file, f"{group}/embedding/{name}", points.astype(np.float32))
                    file[f"{group}/embedding/{name}"].attrs["eigenvalue"] = eigenvalues.astype(np.float32)
                for count in _CLUSTERS:
                    clusters = _clusters(embeddings["spectral"][0], count)
                    results.put(file, f"{group}/cluster/kmeans-{count:02}", clusters.astype(np.int32))
                on_progress("classes", done, len(classes))


def _reduced(relevance: Array) -> Array:
    """Heatmaps (N, pixels) of relevance (N, C, H, W): at most 32 x 32 means, of length 1; what is all zero stays so."""
    heat = relevance.sum(1, dtype=np.float64)
    for axis in (1, 2):
        length = heat.shape[axis]
        edges = np.linspace(0, length, min(length, _SIDE) + 1).astype(np.intp)
        widths = np.diff(edges).reshape((-1, 1) if axis == 1 else -1)
        heat = np.add.reduceat(heat, edges[:-1], axis) / widths
    flat = heat.reshape(len(heat), -1)
    flat /= np.maximum(np.abs(flat).max(1, keepdims=True), np.finfo(np.float64).tiny)  # whose squares are no zeros
    small: Array = (flat / np.maximum(np.sqrt((flat**2).sum(1, keepdims=True)), 1e-30)).astype(np.float32)
    return small


def _embeddings(heatmaps: Array) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Points (n, 2 to 8) and eigenvalues, by method; ViRelAy shows the last eigenvalue first."""
    from sklearn.decomposition import PCA

    count = min(_COMPONENTS, *heatmaps.shape)
    if len(heatmaps) == 1:
        alone = _wide(np.zeros((1, 1))), np.zeros(1)
        return {"pca": alone, "spectral": alone}
    pca = PCA(count, random_state=_SEED)
    with np.errstate(divide="ignore", invalid="ignore"):  # where all are the same
        points = pca.fit_transform(heatmaps)
    points[np.abs(points) < 1e-6] = 0  # which is rounding
    return {"pca": (_wide(points), pca.explained_variance_[::-1]), "spectral": _spectral(points)}


def _spectral(points: Array) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Eigenvectors of the random walk on the graph of nearest neighbours, but for the first, which is constant."""
    from scipy.sparse import diags
    from scipy.sparse.linalg import eigsh
    from sklearn.neighbors import kneighbors_graph

    count = len(points)
    graph = kneighbors_graph(points, max(1, min(_NEIGHBORS, count // 3)))
    graph = graph.maximum(graph.T)
    root = np.sqrt(np.asarray(graph.sum(1)).ravel())  # of degrees: none is 0
    walk = diags(1 / root) @ graph @ diags(1 / root)
    if count <= _DENSE:
        values, vectors = np.linalg.eigh(walk.toarray())
    else:
        start = np.random.default_rng(_SEED).random(count)
        values, vectors = eigsh(walk, _EIGENVALUES, which="LA", v0=start)
    order = np.argsort(-values, kind="stable")[:_EIGENVALUES]
    found = vectors[:, order] / root[:, None] * np.sqrt(graph.sum())
    found *= np.where(found[np.abs(found).argmax(0), np.arange(len(order))] < 0, -1, 1)
    return _wide(found[:, 1:]), np.maximum(1 - values[order[::-1]], 0)


def _wide(points: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """With 2 to 8 dimensions, since ViRelAy draws two; and it draws nothing where all are 0."""
    wide = np.pad(points[:, :_DIMENSIONS], ((0, 0), (0, max(0, 2 - points.shape[1]))))
    return wide if wide.any() else np.eye(1, wide.shape[1]).repeat(len(wide), 0)


def _clusters(points: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """The cluster of each, 0 for the largest; fewer than `count` where there are fewer points that differ."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    means = KMeans(min(count, len(points)), n_init=4, random_state=_SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer points that differ
        found = means.fit_predict(points[:, :count - 1])
    places = np.argsort(np.argsort(-np.bincount(found, minlength=count), kind="stable"))
    clusters: npt.NDArray[np.int64] = places[found]
    return clusters


# ---- Images ----------------------------------------------------------------------------------------------------------


def _write_input(place: Path, run: results.Results, digest: str, on_progress: Callable[[str, int, int], Any]
                 ) -> list[tuple[str, str]]:
    """Write input.h5, unless it is there. Returns name and reason of each image that cannot be read."""
    import h5py

    from fastdtd import images, sources  # which import Pillow

    path, failed = place / INPUT, []
    with contextlib.suppress(OSError), h5py.File(path, "r", locking=False) as file:
        if file.attrs.get("shards") == digest:
            return []
    ranks = int(run.columns["rank"].max()) + 1
    numbers = run.columns["image"][::ranks].tolist()
    entries = results.read_set(place, set(numbers))
    size = run.manifest["model"]["input"][1:]
    shape = len(numbers), *size, 3

    def read(number: int) -> npt.NDArray[np.uint8]:
        try:
            image = sources.open_image(entries[number], tuple(size) if run.manifest["draft"] else None)
            return np.asarray(images.fit(image, size, run.manifest["preprocessing"]["resize"]))
        except PictureError as error:
            failed.append((entries[number].name, str(error)))
            return np.full((*size, 3), _GRAY, np.uint8)

    def write(beside: Path) -> None:
        nbytes = math.prod(shape) + 8 * len(run)
        with (_hdf5_with_room(beside, nbytes) as file, ThreadPoolExecutor(usable_processors()) as threads):
            results.put(file, "label", run.columns["label"])
            stored = file.create_dataset("data" if ranks == 1 else "images", shape, np.uint8, track_times=False)
            step = _rows_at_a_time(math.prod(shape[1:]))
            for first in range(0, len(numbers), step):
                part = list(threads.map(read, numbers[first:first + step]))
                stored[first:first + len(part)] = np.stack(part)
                on_progress("images", first + len(part), len(numbers))
            if ranks > 1:
                _add_repeated(file, shape, ranks)
            if not failed:  # else they are tried again the next time
                file.attrs["shards"] = digest

    replace(path, write)
    return sorted(failed)


def _add_repeated(file: Any, shape: Sequence[int], ranks: int) -> None:
    """`data`, with each of `images` as often as it has heatmaps; no byte is stored twice."""
    import h5py

    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_obj_track_times(False)
    space = h5py.h5s.create_simple((shape[0] * ranks, *shape[1:]))
    for rank in range(ranks):
        space.select_hyperslab((rank, 0, 0, 0), (shape[0], 1, 1, 1), (ranks, 1, 1, 1), (1, *shape[1:]))
        layout.set_virtual(space, b".", b"images", h5py.h5s.create_simple(tuple(shape)))
    space.select_all()
    h5py.h5d.create(file.id, b"data", h5py.h5t.STD_U8LE, space, layout)


# ---- The project -----------------------------------------------------------------------------------------------------


def _label_map(names: Sequence[str], digits: int) -> str:
    """ViRelAy finds classes by the groups' names as "word_net_id". Label -1, which attribution.h5 has where the true
    one is not known, must be there too: without it such images do not open."""
    labels = [{"index": -1, "word_net_id": "-", "name": "no true label"}]
    labels += ({"index": number, "word_net_id": f"{number:0{digits}}", "name": name}
               for number, name in enumerate(names))
    return json.dumps(labels, indent=1) + "\n"


def _project(place: Path, run: results.Results, strategy: str) -> str:
    # ViRelAy tells projects apart by their names, and methods must not have a "-".
    name = json.dumps(printable(place.resolve().name), ensure_ascii=False)
    return f"""\
project:
  name: {name}
  model: "{run.manifest['model']['sha256'][:8]}"
  label_map: {LABEL_MAP}
  dataset:
    name: {name}
    type: hdf5
    path: {INPUT}
  attributions:
    attribution_method: fastdtd
    attribution_strategy: {strategy}
    sources: [{results.RESULT}]
  analyses:
  - analysis_method: spectral_analysis
    sources: [{ANALYSIS}]
"""
