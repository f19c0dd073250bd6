# One word a chore. `make demo` and `make test` need nothing but Python 3.10 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# TensorRT's type stubs, which want the library itself beside them, and put down two functions that are no Python.
STUBS = rm -rf $(VENV)/stubs && $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-compile \
	--target $(VENV)/stubs tensorrt-stubs==10.13.0.35.1 && sed -i.bak -E \
	-e 's/, in: /, in_: /g' -e 's/, channel_axis: int\) -> IScaleLayer/, channel_axis: int = 0) -> IScaleLayer/' \
	$(VENV)/stubs/tensorrt_bindings/tensorrt.pyi

.PHONY: install demo test chaos format lint types unit loadtest bench docs deploy-check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "trirank needs Python 3.10 or later; say make PYTHON=python3.11, for instance"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "python3 -m venv failed; on Debian and Ubuntu install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(STUBS)
	@touch $@

demo: install
	@$(BIN)/python -m trirank_build.demo

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Real processes are killed, stopped and starved: some minutes, alone.
chaos: install
	$(BIN)/python -m pytest -m chaos tests/chaos

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/python -m pytest -m "not e2e and not engines and not chaos"

# 20 seconds of rank requests at a fixed rate against the demo's release.
loadtest: install
	@$(BIN)/trirank loadtest work/demo/releases/current

bench: install
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/tried.py
	$(BIN)/python benchmarks/peer_servers.py install
	$(BIN)/python benchmarks/against_peers.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/rerank.py
	$(BIN)/python benchmarks/feedback.py
	$(BIN)/python benchmarks/chaos.py
	$(BIN)/python benchmarks/privacy.py
	$(BIN)/python benchmarks/scenarios.py
	$(BIN)/python benchmarks/closed_loop.py
	$(BIN)/python benchmarks/hops.py
	$(BIN)/python benchmarks/encoder.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/text.py
	$(BIN)/python benchmarks/compression.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/hot_swap.py
	$(BIN)/python benchmarks/client.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/tables.py

# Writes the figures' tables into the documents again.
docs: install
	$(BIN)/python benchmarks/tables.py

# The Dockerfile's steps without Docker, with the demo's release.
deploy-check: demo
	deploy/check work/demo/releases/current

clean:
	rm -rf $(VENV) work dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
