"""The tables of docs/networks.md and README.md have all networks that are compared."""

from conftest import HEADLINE, README, TABLES, TABLES_FILE, table_in
from test_keras_applications import NETWORKS as KERAS
from test_public_files import MTCNN, ONNX
from test_whole_networks import OTHERS, SEGMENTATION, TORCHVISION, TRAINED, WRITTEN


def test_the_tables_are_of_these_networks():
    table, headline = table_in(TABLES_FILE, "networks"), table_in(README, "networks")
    assert table.startswith(TABLES["networks"])
    assert headline.startswith(TABLES["networks"])
    lines = table.splitlines()[2:]
    names = [line.split("|")[1].strip() for line in lines]
    public = [*ONNX, *(f"MTCNN, {net}-Net" for net in MTCNN)]
    assert names == ["ConvNeXt-Tiny", *TORCHVISION.values(), *WRITTEN, *SEGMENTATION.values(), *OTHERS.values(),
                     *KERAS,
                     *(f"{name}, trained" for name in public), *TRAINED]
    assert headline.splitlines()[2:] == [line for line, name in zip(lines, names, strict=True)
                                         if name in HEADLINE and "| Keras |" not in line]
