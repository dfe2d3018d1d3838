# Every target sets up what it needs. ENGINE=sim runs the demo without a download.
PYTHON ?= python3
ENGINE ?= llamacpp
VENV   := .venv
BIN    := $(VENV)/bin
WORKSPACE := . $(wildcard plugins/dynamo-*) $(wildcard plugins/routers/dynamo-*)
EDITABLE  := $(foreach p,$(WORKSPACE),-e ./$(p))
STACK_llamacpp := samples/quickstart.toml
STACK_sim      := samples/quickstart-sim.toml
STACK_vllm     := samples/quickstart-vllm.toml
VLLM   := .venv-vllm
SMOLLM := .cache/models/smollm2/config.json

# Every process that a test starts would otherwise compile what the one before has compiled. Kept in the environment, not beside the sources.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/bytecode

.PHONY: demo test quick slow slow-vllm lint bench peers chaos servers kube-apiserver clean
.DEFAULT_GOAL := demo

# The stamp follows every pyproject.toml, and what is compiled: a change of either installs again.
$(VENV)/.installed: $(foreach p,$(WORKSPACE),$(p)/pyproject.toml $(wildcard $(p)/src/*/*.[ch]))
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install --quiet "uv>=0.5"
	@echo "installing the workspace"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python $(EDITABLE)
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --group dev
	@touch $@

# vLLM for CPU takes two gigabytes, so it has an environment of its own, made only when it is asked for.
VLLM_EDITABLE := $(foreach p,. plugins/dynamo-vllm plugins/dynamo-openai plugins/routers/dynamo-kv-router,-e ./$(p))
$(VLLM)/.installed: $(VENV)/.installed plugins/dynamo-vllm/install-cpu.sh plugins/dynamo-vllm/pyproject.toml plugins/dynamo-openai/pyproject.toml
	@echo "making $(VLLM) with vLLM for CPU"
	@test -x $(VLLM)/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python $(VLLM)
	@plugins/dynamo-vllm/install-cpu.sh $(VLLM)/bin/python $(BIN)/uv
	@$(BIN)/uv pip install --quiet --python $(VLLM)/bin/python $(VLLM_EDITABLE) accelerate gguf hypothesis "openai>=1.60" "pytest>=8" "pytest-asyncio>=0.25" "pytest-timeout>=2.3"
	@$(BIN)/uv pip install --quiet --python $(VLLM)/bin/python --no-deps "nixl==1.5.1" "nixl-cu12==1.5.1"
	@touch $@

$(SMOLLM): $(VLLM)/.installed
	@echo "converting SmolLM2 for vLLM"
	@$(VLLM)/bin/python -m dynamo_vllm.from_gguf "$$($(BIN)/python -m dynamo_llamacpp fetch)" $(dir $@) >/dev/null
	@touch $@

ifeq ($(ENGINE),vllm)
demo: $(SMOLLM)
	@$(VLLM)/bin/dynamo demo $(STACK_vllm)
else
demo: $(VENV)/.installed
	@$(if $(STACK_$(ENGINE)),,$(error ENGINE is one of: llamacpp, sim, vllm))
	@$(BIN)/dynamo demo $(STACK_$(ENGINE))
endif

# Many tests kill, stop and starve real processes on whatever machine this is. What fails is tried once more, by itself and with a
# new clock; both tries are in the log, and such a test deserves a look. The arguments: seconds at most, python, what to run.
tests = timeout -k 30 $(1) $(2) -m pytest -q $(3) $(4) || { echo "once more, only what failed:"; timeout -k 30 600 $(2) -m pytest -q $(3) --last-failed --last-failed-no-failures none; }

test: lint quick slow slow-vllm

quick: servers $(VENV)/.developing
	$(call tests,1200,$(BIN)/python,-m "not slow",-n 4 --dist worksteal)

# Most of them wait for clocks and processes: two files at a time.
slow: servers kube-apiserver $(VENV)/.developing
	$(call tests,2400,$(BIN)/python,-m slow,-n 2 --dist loadfile)

slow-vllm: $(VLLM)/.installed
	export OMP_NUM_THREADS=1; $(call tests,1200,$(VLLM)/bin/python,-m slow plugins/dynamo-vllm plugins/dynamo-openai)

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

# Faults, crowds and a soak of SOAK minutes, with all their numbers in docs/reliability.md: about forty minutes. As root it tries more
# (networks, a full disk).
SOAK ?= 20
chaos: servers $(VENV)/.developing
	$(BIN)/python -m benchmarks.chaos.everything --soak $(SOAK)

# The real servers that tests start on free ports: etcd and NATS for the planes, Prometheus for the planner. Their own services stay off.
SERVERS := etcd-server nats-server prometheus
servers:
	@PATH="$$PATH:/usr/sbin"; if command -v etcd >/dev/null && command -v nats-server >/dev/null && command -v prometheus >/dev/null; then exit 0; fi; \
	  command -v apt-get >/dev/null || { echo "the tests need etcd, nats-server and prometheus in PATH; install them with the tools of your system"; exit 1; }; \
	  test "$$(id -u)" = 0 || { echo "the tests need etcd, nats-server and prometheus: sudo apt-get install $(SERVERS)"; exit 1; }; \
	  echo "installing $(SERVERS)"; apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -qq -y --no-install-recommends $(SERVERS) >/dev/null

# The real API server that the tests of dynamo-kubernetes start: built once for each machine, as no distribution of Debian 12 has the program.
kube-apiserver:
	@plugins/dynamo-kubernetes/tests/kube-apiserver.sh >/dev/null

clean:
	rm -rf $(VENV) $(VLLM) .dynamo .pytest_cache .ruff_cache .hypothesis
