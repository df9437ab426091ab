# Every target sets up what it needs; a second call finds the stamp and starts at once.
#   make quickstart   environment, a drafter for a small real model, its numbers, an export
#   make test         environment and the whole test suite in JOBS processes (PYTEST_ARGS adds options)
#   make engines      serving engines in environments of their own; their tests are skipped without
#   make check        lint, format, types, import contract
#   make bench        speed and memory of attention, the chunked loss and an EAGLE-3 training step
#                     (PEER=<python with speculators 0.9> measures that library beside them)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
PEER ?=
JOBS ?= 2
ENGINES ?= vllm llamacpp

.PHONY: install quickstart test engines check bench

install: $(STAMP)

# torch goes first and pinned: resolving a range could fetch gigabytes that the pin does not need.
$(STAMP): pyproject.toml constraints.txt requirements-embedded.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r requirements-embedded.txt
	touch $@

quickstart: $(STAMP)
	$(BIN)/python -m train +experiment=hydra_heads
	$(BIN)/python -m decode run=runs/hydra_heads/latest bench=mt_bench limit=16
	$(BIN)/python -m export run=runs/hydra_heads/latest exporter=hf

# Engines come after the rest and one by one: each takes all cores and some GB. 5: none was asked for.
test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --engines=without $(PYTEST_ARGS)
	$(BIN)/python -m pytest --engines=only $(PYTEST_ARGS) || test $$? -eq 5

# The environments of the engines that the tests run, in the user's cache.
engines: $(STAMP)
	for engine in $(ENGINES); do $(BIN)/python -m export install=$$engine || exit 1; done

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m scripts.bench_attention
	$(BIN)/python -m scripts.bench_loss $(if $(PEER),--peer $(PEER))
	$(BIN)/python -m scripts.bench_unroll --steps 3 7 --positions 512 1024 2048 $(if $(PEER),--peer $(PEER))
	$(BIN)/python -m scripts.bench_unroll --turns 89 79 --out bench_unroll_turns.json \
	    --steps 3 7 --positions 512 1024 2048 $(if $(PEER),--peer $(PEER))
