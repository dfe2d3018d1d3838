# Every target sets up what it needs. ENGINE=sim runs the demo without a download.
PYTHON ?= python3
ENGINE ?= llamacpp
VENV   := .venv
BIN    := $(VENV)/bin
WORKSPACE := . $(wildcard plugins/dynamo-*) $(wildcard plugins/routers/dynamo-*)
EDITABLE  := $(foreach p,$(WORKSPACE),-e ./$(p))
STACK_llamacpp := samples/quickstart.toml
STACK_sim      := samples/quickstart-sim.toml

.PHONY: demo test quick slow lint bench peers clean
.DEFAULT_GOAL := demo

# The stamp follows every pyproject.toml: a change of dependencies installs again.
$(VENV)/.installed: $(foreach p,$(WORKSPACE),$(p)/pyproject.toml)
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install --quiet "uv>=0.5"
	@echo "installing the workspace"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python $(EDITABLE)
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --group dev
	@touch $@

demo: $(VENV)/.installed
	@$(if $(STACK_$(ENGINE)),,$(error ENGINE is one of: llamacpp, sim))
	@$(BIN)/dynamo demo $(STACK_$(ENGINE))

test: lint quick slow

quick: $(VENV)/.developing
	$(BIN)/python -m pytest -q -m "not slow" -n 4

slow: $(VENV)/.developing
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.developing
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# make bench PEERS=dir compares with the peer that `make peers PEERS=dir` installed there.
bench: $(VENV)/.developing
	PEERS=$(PEERS) $(BIN)/python -m benchmarks.run $(BENCH)

peers:
	@$(if $(PEERS),,$(error say where: make peers PEERS=dir))
	PYTHON=$(PYTHON) benchmarks/peers.sh $(PEERS)

clean:
	rm -rf $(VENV) .dynamo .pytest_cache .ruff_cache .hypothesis
