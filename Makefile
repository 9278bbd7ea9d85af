# Everything this workbook does from a shell; `make` lists it. Every target first sees to the
# Python environment (experiments/setup.sh), so `make reproduce` is all a new clone needs.

SHELL := bash
PRESET ?= laptop
# Some presets are about some notebooks only.
notebooks_of_ablation := 16_ablations
notebooks_of_acting := 06_simulated_control
notebooks_of_choices := 16_ablations
notebooks_of_distillation := 02_datasets
notebooks_of_fifth := 04_training
notebooks_of_fourth := 04_training
notebooks_of_lead := 04_training
notebooks_of_ood := 10_out_of_distribution
notebooks_of_pretrain := 04_training
notebooks_of_questions := 08_text_samples
notebooks_of_released := 06_simulated_control
notebooks_of_scaling := 09_scaling_laws
notebooks_of_seventh := 04_training
notebooks_of_sixth := 04_training
notebooks_of_specialists := 12_specialists
notebooks_of_stacking := 07_rgb_stacking 11_finetune_stacking
notebooks_of_third := 04_training
NOTEBOOK ?= $(notebooks_of_$(PRESET))

# Command-line variables do not reach $(shell) by themselves in older makes.
ENVIRONMENT := $(shell GATO_ENV='$(GATO_ENV)' USE_CONDA='$(USE_CONDA)' bash experiments/setup.sh --where)
PYTHON := "$(ENVIRONMENT)/bin/python"
RUN := $(PYTHON) experiments/run.py --preset "$(PRESET)" $(foreach name,$(NOTEBOOK),--notebook $(name))
# Tests run in this many processes; files stay whole, for what their tests share. Each takes up to
# two GB.
JOBS ?= 2
PYTEST := $(PYTHON) -m pytest -n $(JOBS) --dist loadfile --durations 12 --durations-min 5
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout 600 \
	--nbval-sanitize-with notebooks/sanitize.cfg

# The kernelspec that setup.sh installs comes before a user's own; what it sets, also for the
# processes started here.
export JUPYTER_PREFER_ENV_PATH := 1
export JAX_COMPILATION_CACHE_DIR ?= $(ENVIRONMENT)/share/jax-cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
ifeq ($(shell uname -s),Linux)
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export MUJOCO_GL ?= egl
endif

.PHONY: help setup reproduce test test-slow notebooks results references procgen benchmarks tpu-compile site lint lab clean
.DEFAULT_GOAL := help

help: ## list the targets
	@echo "make TARGET [PRESET=smoke|laptop|ablation|accelerator|paper|...] [NOTEBOOK=04_training]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' Makefile

setup: ## make the Python environment, or bring it up to date
	@bash experiments/setup.sh

reproduce: setup ## run the notebooks that are not up to date (or NOTEBOOK and what it needs)
	@$(RUN)

test: setup ## unit tests, then every notebook at smoke size
	@status=0; \
	$(PYTEST) tests -m "not slow" || status=1; \
	$(PYTEST) $(NBVAL) notebooks || status=1; \
	if [ $$status = 0 ]; then echo "test: all passed"; else echo "test: FAILED"; fi; exit $$status

test-slow: setup ## tests that take minutes
	@status=0; \
	$(PYTEST) tests -m slow || status=1; \
	GATO_THOROUGH=1 $(PYTEST) tests/test_tokenizers.py tests/test_sequence.py -m "not slow" || status=1; \
	if [ $$status = 0 ]; then echo "test-slow: all passed"; else echo "test-slow: FAILED"; fi; exit $$status

notebooks: setup ## every notebook at smoke size, as tests
	@$(PYTEST) $(NBVAL) notebooks && echo "notebooks: all passed"

results: setup ## run the notebooks, then update the committed files that PRESET publishes
	@$(RUN) --publish

references: setup ## measure the expert and random returns that scores are relative to
	@$(PYTHON) experiments/references.py

procgen: setup ## install Procgen, whose own pins are too old for pip to accept
	@$(PYTHON) -m pip install --disable-pip-version-check -q --no-deps \
	  -r experiments/procgen-requirements.txt && echo "procgen: installed"

benchmarks: setup ## measure speeds on this machine and update their committed rows
	@for file in $(filter-out %/tpu_compile.py,$(wildcard experiments/benchmarks/*.py)); do \
	  $(PYTHON) $$file || exit 1; done

tpu-compile: setup ## compile the train step for TPU slices, without one (EXTRAS=dev,tpu)
	@$(PYTHON) experiments/benchmarks/tpu_compile.py

site: setup ## notebooks, tasks and figures as static HTML, from experiments/runs/PRESET if given
	@$(PYTHON) experiments/site/build.py $(if $(filter command line,$(origin PRESET)),--preset "$(PRESET)")

lint: setup ## ruff: rules and format, notebooks included
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && echo "lint: clean"

lab: setup ## open the workbook in JupyterLab
	@$(PYTHON) -m jupyterlab notebooks

clean: ## remove caches; environments and experiments/runs stay
	@find . \( -name .venv -o -name .conda -o -name runs -o -name .git \) -prune -o \
	  \( -name __pycache__ -o -name .ipynb_checkpoints -o -name .pytest_cache -o -name .ruff_cache \
	  -o -name .hypothesis -o -name '*.egg-info' \) -print0 | xargs -0 rm -rf
	@echo "clean: caches removed; environments and experiments/runs kept"
