# Every target installs what it needs into .venv and reuses it the next time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-xla bench gpu lint clean

# One install for CPU and GPU machines alike: the wheels carry CUDA and run without it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; expected Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,parquet]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py $(if $(DATA),--data "$(DATA)") $(DEMO)

test: $(STAMP)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 3600

# torch_xla wants the torch of its own version, so it has an environment of its own; PJRT_DEVICE=CPU, no TPU needed
.venv-xla/.installed: pyproject.toml
	@test -x .venv-xla/bin/python || $(PYTHON) -m venv .venv-xla
	.venv-xla/bin/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	.venv-xla/bin/python -m pip install --quiet --editable ".[xla,dev,parquet]"
	@touch $@

test-xla: .venv-xla/.installed
	PJRT_DEVICE=CPU OMP_NUM_THREADS=1 .venv-xla/bin/python -m pytest tests/xla --timeout 900

# every benchmark that runs here, under 20 minutes on two quiet cores; then benchmarks/results/REPORT.md
bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py $(BENCH)

# `make gpu PART=2 NOINSTALL=1 PYTHON=python3` uses the Python at hand as it is; RESULTS is where figures go.
gpu: $(if $(NOINSTALL),,$(STAMP))
	$(if $(NOINSTALL),$(PYTHON),$(BIN)/python) benchmarks/gpu_parts.py \
	  $(if $(PART),--part $(PART)) $(if $(RESULTS),--results "$(RESULTS)") $(GPU)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv-xla build *.egg-info
