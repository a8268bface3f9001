"""A network in a file of Keras's as Keras runs it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdtd.importers.moves import Array
from fastdtd.importers.verify import NotComparedError, Runtime


@dataclass
class KerasRuntime(Runtime):
    """content: the file, which the reader has read and accepted before Keras sees it; which: of its outputs, or which
    layer's."""

    content: bytes = b""
    which: int | str = 0
    _network: Any = None

    def start(self) -> str:
        try:
            import keras
        except ModuleNotFoundError as error:
            raise NotComparedError(f"{error}; `pip install keras tensorflow` installs what it takes") from None
        return f"Keras {keras.__version__}"

    def run(self, inputs: Sequence[Array], key: Any = None) -> Array:
        if self._network is None:
            self._network = self._loaded()
        made = self._network.predict(inputs[0] if len(inputs) == 1 else list(inputs), verbose=0)
        several = list(made.values()) if isinstance(made, dict) else made if isinstance(made, list) else [made]
        return np.asarray(several[self.which if isinstance(self.which, int) else 0])

    def _loaded(self) -> Any:
        import keras

        suffix = ".keras" if self.content[:2] == b"PK" else ".h5"
        with tempfile.TemporaryDirectory() as folder:  # what was read, and not what its path has become since
            path = Path(folder) / f"network{suffix}"
            path.write_bytes(self.content)
            network = keras.models.load_model(str(path), compile=False)
        if isinstance(self.which, int):
            return network
        return keras.Model(network.inputs, network.get_layer(self.which).output)
