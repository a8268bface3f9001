"""Keras files -> configuration and weights: .keras (a zip), and .h5 as model.save wrote it before.

Files come from anywhere. Nothing is unpacked before its size is known, and no code in them is ever run.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastdtd import hdf5
from fastdtd.errors import ConversionError
from fastdtd.graph import MAX_LAYERS
from fastdtd.hdf5_format import SIGNATURE

if TYPE_CHECKING:
    from fastdtd.importers.keras.reader import Node

MAX_CONFIG_BYTES = 2**24
MAX_UNPACKED_BYTES = 2**31
MAX_GROUP_DEPTH = 64
MAX_WEIGHTS = 20 * MAX_LAYERS  # datasets, and the groups that they lie in
MODELS = {"Sequential": "sequential", "Functional": "functional", "Model": "functional"}  # and what weight files say
REQUIRED = "an undamaged file that Keras's model.save wrote"
_KERAS_MODULE = re.compile(r"(tf_)?keras(\.|$)")
_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number",
          bool: "true or false"}


def read(data: bytes, use: Callable[[dict[str, Any], Any, Any], Any]) -> tuple[Any, str]:
    """What `use` makes of the configuration and the weights in a file, which is open meanwhile, and of Keras's version;
    and the file's format."""
    if data.startswith(b"PK"):
        return _read_zip(data, use)
    if data.startswith(SIGNATURE):
        return _read_hdf5(data, use)
    raise ConversionError(f"neither a zip nor an HDF5 file, or its start is damaged; required: {REQUIRED}")


def _read_zip(data: bytes, use: Callable[[dict[str, Any], Any, Any], Any]) -> tuple[Any, str]:
    members = _unpacked(data)
    version = _json(members[_METADATA], _METADATA).get("keras_version") if _METADATA in members else None
    config = _json(members[_CONFIG], _CONFIG)
    with hdf5.opened(members[_WEIGHTS], f"{REQUIRED}, with sound weights in {_WEIGHTS}") as file:
        return use(config, NumberedWeights(file), version), _format(version)


def _unpacked(data: bytes) -> dict[str, bytes]:
    """The members of a .keras file that are known. Nothing else is unpacked, and nothing before its size is known."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = [info for info in archive.infolist() if info.filename in (_CONFIG, _METADATA, _WEIGHTS)]
            names = [info.filename for info in found]
            if len(set(names)) < len(names):
                raise ConversionError(f"damaged: it holds {', '.join(sorted(names))}; required: each once")
            for name in (_CONFIG, _WEIGHTS):
                if name not in names:
                    raise ConversionError(f"a zip without {name}; required: {REQUIRED}")
            if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in found):
                raise ConversionError("packed by an unusual method; required: stored or deflated members, as Keras "
                                      "writes them")
            total = sum(info.file_size for info in found)
            texts = max(info.file_size for info in found if info.filename != _WEIGHTS)
            if total > MAX_UNPACKED_BYTES or texts > MAX_CONFIG_BYTES:
                raise ConversionError(f"unpacks to {total} bytes, {texts} of them in one text; at most "
                                      f"{MAX_UNPACKED_BYTES} and {MAX_CONFIG_BYTES} are accepted")
            return {info.filename: archive.read(info) for info in found}  # zipfile gives no more than file_size says
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, OSError, RuntimeError, ValueError) as error:
        raise ConversionError(f"damaged, or no .keras file ({error}); required: {REQUIRED}") from None


def _read_hdf5(data: bytes, use: Callable[[dict[str, Any], Any, Any], Any]) -> tuple[Any, str]:
    with hdf5.opened(data, REQUIRED) as file:
        found = hdf5.named_attributes(file, "the file")
        texts = {}
        for name in ("format", "keras_version", "model_config"):
            if name in found:
                where = f"root attribute {name!r}"
                texts[name] = hdf5.single(hdf5.values(found[name], file.content, where, MAX_CONFIG_BYTES), str, where)
        if "model_config" not in texts:
            if texts.get("format") == "fastdtd-model":
                raise ConversionError("already a fastdtd model file; it needs no conversion (fastdtd.load reads it)")
            raise ConversionError("has no root attribute 'model_config', so it holds weights at most; required: a "
                                  "whole model, as model.save('net.keras') writes it")
        members = hdf5.children(file, "the file", MAX_LAYERS)
        if "model_weights" not in members:
            raise ConversionError(f"has no group 'model_weights'; required: {REQUIRED}")
        weights = NamedWeights(hdf5.group(members["model_weights"], "/model_weights"))
        config = _json(texts["model_config"].encode(), "model_config")
        return use(config, weights, texts.get("keras_version")), _format(texts.get("keras_version")) + " (HDF5)"


def _format(version: Any) -> str:
    is_known = isinstance(version, str) and version
    return f"keras {''.join(c for c in version if c.isprintable())[:40]}" if is_known else "keras"


def _json(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"damaged: {where} is no JSON, or nested too deeply ({str(error)[:100]}); required: "
                              f"{REQUIRED}") from None
    checked: dict[str, Any] = expect(value, dict, where)
    return checked


def expect(value: Any, kind: type, where: str) -> Any:
    """`value`, which JSON gave, where it is of `kind`; a float may be an int, and a bool is neither."""
    is_bool = isinstance(value, bool)
    if (is_bool if kind is bool else not is_bool and isinstance(value, (int, float) if kind is float else kind)):
        return value
    found = "null" if value is None else f"{_KINDS.get(type(value), 'something else')} {str(value)[:60]!r}"
    raise ConversionError(f"{where} is {found}; required: {_KINDS[kind]}")


def is_keras_module(module: Any) -> bool:
    """Whether a class is Keras's own, by its module; None where the file does not say it."""
    return module is None or bool(_KERAS_MODULE.match(str(module)))


class NumberedWeights:
    """Of a .keras file: groups are numbered by class in each model, and a layer's weights are numbered in its group."""

    def __init__(self, file: Any) -> None:
        self.root = file

    def locate(self, model: Node | None, nodes: Sequence[Node]) -> None:
        """Tell the layers of `model` where their weights are."""
        root = self.root if model is None else model.location
        by_class: dict[str, list[Node]] = {}
        for node in nodes:
            by_class.setdefault(MODELS.get(node.kind) or _snake_case(node.kind), []).append(node)
        groups: dict[str, Any] = {}
        if root is not None:
            parts = hdf5.children(root, "a model in the weights", MAX_LAYERS)
            container = parts.get("layers", parts.get("_layer_checkpoint_dependencies"))
            if container is not None:
                groups = hdf5.children(container, "the layers in the weights", MAX_LAYERS)
        numbered: dict[str, list[tuple[int, Any]]] = {}
        for name, group in groups.items():
            stem, _, number = name.rpartition("_")
            kind, index = (stem, int(number)) if number.isdecimal() and len(number) < 9 else (name, 0)
            numbered.setdefault(kind, []).append((index, group))
        for kind, of_kind in by_class.items():
            # Keras 2.12 skips numbers; what holds is their order.
            found = [group for _, group in sorted(numbered.get(kind, []), key=lambda entry: entry[0])]
            for node, group in zip(of_kind, found if len(found) == len(of_kind) else [], strict=False):
                node.location = group

    def find(self, node: Node, names: Sequence[Sequence[str]]) -> list[Any]:
        if node.location is None:
            node.refuse("has no weights of its own in the file, or layers of its class are not as many there as here; "
                        "required: a model that is saved whole, and layers that belong to one model only")
        where = str(node)
        parts = hdf5.children(hdf5.group(node.location, where), where, MAX_LAYERS)
        found = hdf5.children(hdf5.group(parts["vars"], where), where, 16) if "vars" in parts else {}
        return [found.get(str(i)) for i in range(len(names))]


class NamedWeights:
    """Of a .h5 file: groups have the names of the outermost layers, and paths end in a layer's and a weight's name."""

    def __init__(self, root: Any) -> None:
        self.datasets: dict[str, Any] = {}
        waiting = [("", root)]
        seen: dict[int, str] = {}  # hard links may lead round in circles, or to the same group again and again
        while waiting:
            path, group = waiting.pop()
            where = f"/model_weights{path}"
            if seen.setdefault(group.address, path) != path:
                raise ConversionError(f"holds the group {where!r} a second time, as "
                                      f"'/model_weights{seen[group.address]}'; required: {REQUIRED}")
            for name, child in hdf5.children(group, where, MAX_LAYERS).items():
                if hdf5.kind(child, f"{where}/{name}") == "dataset":
                    self.datasets[f"{path}/{name}"] = child
                else:
                    waiting.append((f"{path}/{name}", hdf5.group(child, f"{where}/{name}")))
            if len(seen) + len(self.datasets) > MAX_WEIGHTS or path.count("/") > MAX_GROUP_DEPTH:
                raise ConversionError(f"holds more weights than {MAX_LAYERS} layers have, or too deep groups; "
                                      f"required: {REQUIRED}")
        self._within: dict[str, list[str]] = {}  # by the name of the outermost group
        self._of_layer: dict[tuple[str, str], list[str]] = {}  # and by that of the innermost
        for path in self.datasets:
            _, outermost, *groups = path.split("/")
            self._within.setdefault(outermost, []).append(path)
            innermost = ([outermost, *groups][:-1] or [outermost])[-1]
            self._of_layer.setdefault((outermost, innermost), []).append(path)

    def locate(self, model: Node | None, nodes: Sequence[Node]) -> None:
        for node in nodes:
            node.location = (f"/{node.name}/", True) if model is None else (model.location[0], False)

    def find(self, node: Node, names: Sequence[Sequence[str]]) -> list[Any]:
        prefix, is_outermost = node.location
        outermost, innermost = prefix.split("/")[1], node.name.split("/")[-1]
        found = []
        for choices in names:
            weight = rf"({'|'.join(choices)})(_\d+)?(:\d+)?$"
            paths = _matching(self._of_layer.get((outermost, innermost), ()), prefix,
                              rf"(/|^){re.escape(node.name)}/{weight}")
            if not paths and is_outermost:  # a layer that was given another name after it was made
                paths = _matching(self._within.get(outermost, ()), prefix, f"(/|^){weight}")
            if len(paths) > 1:
                node.refuse(f"may have its {choices[0]} in {' or '.join(map(repr, paths[:3]))}; required: one place. "
                            "Save the model as .keras")
            found.append(self.datasets[paths[0]] if paths else None)
        return found


def _matching(paths: Sequence[str], prefix: str, ending: str) -> list[str]:
    pattern = re.compile(ending)
    return [path for path in paths if path.startswith(prefix) and pattern.search(path[len(prefix):])]


def _snake_case(name: str) -> str:
    """As Keras makes the names of groups from those of classes."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()
