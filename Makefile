# Six commands, of which each first makes what it lacks: demo, train, test, lint, bench, bench-check.
PYTHON ?= python3
RANKS ?= 4
BIN := .venv/bin
BENCH := $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node gpu -m benchmarks.ep

.PHONY: demo train test lint bench bench-check bench-reference bench-model gpus venv tools toolkits plots

# A mixture-of-experts layer over RANKS ranks: on GPUs if there are enough, else simulated.
demo: venv
	$(BIN)/python examples/moe_layer.py --ranks $(RANKS)

# A small language model of that kind, trained over RANKS ranks and on one; draws loss.png.
train: plots
	$(BIN)/python examples/train_moe.py --ranks $(RANKS)

# Everything that this machine can test.
test: lint toolkits
	$(BIN)/python -m pytest -n auto

# Style and types. tests/unit/test_tidy.py, a part of `test`, holds the rules that no tool knows.
lint: tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	find deep_ep benchmarks -regex '.*\.\(cuh\|hpp\|cpp\)' -exec $(BIN)/clang-format --dry-run -Werror {} +

# Speed, on a host with GPUs.
bench: gpus plots
	$(BENCH)

# Fails if a call has become 10 % slower than the committed reference says, as a multiple of the floor of the same run.
bench-check: gpus plots
	$(BENCH) --reference benchmarks/reference.json

# Makes the reference's part for hosts of this kind; to be committed with what made it change.
bench-reference: gpus plots
	$(BENCH) --write-reference benchmarks/reference.json

# Fails if a call with as many SMs as the model says is 5 % slower than with the best number.
bench-model: gpus plots
	$(BENCH) --check-model

# Ends the benchmarks at once on a host without GPUs.
gpus: venv
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("benchmarks need GPUs, and torch sees none")'

venv: .venv/ready
tools: .venv/tools-ready
plots: .venv/plots-ready
toolkits: .toolkits/ready

.venv/ready: pyproject.toml scripts/make_venv.sh
	PYTHON=$(PYTHON) scripts/make_venv.sh

.venv/tools-ready: .venv/ready
	$(BIN)/python -m pip install -e '.[test,dev,examples]'
	touch $@

.venv/plots-ready: .venv/ready
	$(BIN)/python -m pip install -e '.[examples]'
	touch $@

.toolkits/ready: scripts/fetch_toolkits.sh | .venv/ready
	scripts/fetch_toolkits.sh
