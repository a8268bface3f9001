"""Documentation: examples in docstrings and in the README run, links lead to files, commands that are told of exist."""

import contextlib
import doctest
import importlib.util
import io
import pkgutil
import re
from pathlib import Path

import pytest
from importing import node, numbers, onnx_file
from PIL import Image

import fastdtd
from fastdtd import cli
from fastdtd.model_file import MODELS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
BUILT = {"tutorial.ipynb"}  # pages that the site has and the repository has not
OPTIONAL = {"cupy", "google", "keras", "numba_cuda", "onnx", "onnxruntime", "torch"}
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(fastdtd.__path__, "fastdtd.", onerror=lambda name: None)
    if not module.name.startswith(("fastdtd.__main__", "fastdtd.models.build", "fastdtd.kernels")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with what examples read."""
    for name, picture in (("cat", "chelsea"), ("coffee", "coffee")):
        with Image.open(MODELS / f"{picture}.png") as image:
            image.convert("RGB").save(tmp_path / f"{name}.jpg", quality=95)
    if importlib.util.find_spec("onnx"):
        nodes = [node("Conv", ["x", "w"], ["h"]), node("GlobalAveragePool", ["h"], ["p"]),
                 node("Flatten", ["p"], ["y"])]
        (tmp_path / "net.onnx").write_bytes(onnx_file(nodes, {"w": numbers(2, 3, 3, 3)}, (1, 3, 9, 9)))
    (tmp_path / "names.txt").write_text("cat\ncoffee\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["fastdtd", *MODULES])
def test_examples_in_docstrings(name, folder):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OPTIONAL:
            pytest.skip(f"{error.name} is not installed")
        raise
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not failed


def test_the_example_in_the_readme(folder):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 1
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(examples[0], {})
    assert "Egyptian cat" in printed.getvalue()
    assert (folder / "cat.overlay.png").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)]
    missing = [link for link in links
               if (path := link.partition("#")[0]) and path not in BUILT and not (page.parent / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_pages(page):
    """Anchors are headings, as GitHub names them."""
    for link in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        headings = re.findall(r"^#+ (.+)$", (page.parent / path if path else page).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_commands_that_are_told_of_exist(capsys):
    text = "\n".join(page.read_text() for page in PAGES)
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    commands = set(re.findall(r"^fastdtd ([a-z]+)", lines, re.MULTILINE)) | set(re.findall(r"`fastdtd ([a-z]+)", text))
    assert {"explain", "convert", "show", "rules", "warmup"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
    options = set(capsys.readouterr().out.split())
    told = set(re.findall(r" (--[a-z]+)", "\n".join(re.findall(r"^fastdtd .*", lines, re.MULTILINE))))
    assert told - {"--help"} <= {option.strip("[],").partition("=")[0] for option in options}


def test_targets_of_make_that_are_told_of_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE)) <= targets
