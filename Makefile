# make demo   the online test-time RL loop on the embedded model, about 5 minutes on 2 cores after installation
# make test   linter, format check and the whole test suite
# make aot    compiles every kernel for TPUs and GPUs that are not here, at the shapes of real models
# make tiny   trains the embedded model assets/tiny-vl again from scratch (demonstrations, SFT, RFT)
#
# Everything is installed into .venv. PYTHON=/path/to/python3.12 chooses the interpreter.

SEED ?= 0
SHIFT ?= dim
# Of the questions: empty for digits; or some of those that need other tools, such as color+shape.
KIND ?=
# Of its own for each setting: a workdir continues what began in it.
WORKDIR ?= runs/demo-$(SHIFT)$(if $(KIND),-$(KIND))-$(SEED)
TINY ?= runs/tiny

# Compiled programs are kept: what is run again starts at once.
CACHED := JAX_COMPILATION_CACHE_DIR=.cache/jax
# glibc's large buffers in huge pages. XLA asks for its buffers anew at each step, and a fifth of the
# time of training went into page faults. Other C libraries do not read it.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

# Tests start some forty processes, each of which would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
# The extra `aot`, apart: where JAX finds these compilers it looks for their devices at each start.
AOT := $(VENV)/aot
LIST_AOT := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["aot"], sep="\n")

# The first of these that runs and is new enough; pyenv leaves names on the path that do not run.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: help demo test lint aot tiny clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# //p' Makefile | head -4

# pip is the last thing venv makes: an interrupted venv is made again.
$(BIN)/pip:
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	  echo "pixelis_jax needs Python 3.11 or newer, found $$("$(PYTHON)" --version 2>/dev/null || echo none)." >&2; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# rapidocr asks for the plain OpenCV wheel; where that was unpacked last, the trackers are gone.
CSRT := $(BIN)/python -c 'import cv2; cv2.TrackerCSRT_create' 2>/dev/null || \
  $(BIN)/python -m pip install --quiet --no-deps --force-reinstall opencv-contrib-python-headless

# Stamps: nothing is installed again until pyproject.toml changes.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo "Installing into $(VENV): a few minutes the first time."
	$(BIN)/python -m pip install --quiet -e '.[cpu]'
	@$(CSRT)
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/pip
	@echo "Installing into $(VENV): a few minutes the first time, torch is large."
	$(BIN)/python -m pip install --quiet -e '.[cpu,test]'
	@$(CSRT)
	$(BIN)/python -c '$(LIST_AOT)' > $(VENV)/aot.txt
	$(BIN)/python -m pip install --quiet --upgrade --target $(AOT) -r $(VENV)/aot.txt
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(CACHED) $(BIN)/python -m pixelis_jax.online --config=configs/demo.py:$(SHIFT)$(if $(KIND),/$(KIND)) --workdir=$(WORKDIR) --config.seed=$(SEED)
	$(BIN)/pixelis view $(WORKDIR)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# One process more than there are cores: some tests wait for processes of their own.
test: lint
	$(BIN)/python -m pytest -q -n $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

aot: $(VENV)/.installed-test
	PYTHONPATH=$(AOT) $(BIN)/python -m kernels.aot --out runs/aot.json

# Continues where it was stopped; TINY=elsewhere begins again.
tiny: $(VENV)/.installed
	$(BIN)/python scripts/tiny_init.py --out assets/tiny-vl
	$(BIN)/python -m pixelis_jax.data.build --manifest=docs/manifests/tiny.json --out=$(TINY)-data
	$(BIN)/python -m pixelis_jax.sft --config=configs/tiny_sft.py --workdir=$(TINY)-sft --config.data.file=$(TINY)-data
	$(BIN)/python -m pixelis_jax.rft --config=configs/tiny_rft.py:tools --workdir=$(TINY)-rft --config.model.path=$(TINY)-sft/model
	$(BIN)/pixelis export $(TINY)-sft assets/tiny-vl-sft --force
	$(BIN)/pixelis export $(TINY)-rft assets/tiny-vl --force

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis *.egg-info
