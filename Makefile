# make lab        set up, then open the labs in JupyterLab     PORT= HOST=
# make setup      the same without opening anything (containers, editors)
# make test       set up, then lint, tests, notebooks, browser
# make gpu        tests, notebooks and benchmarks on a CUDA GPU; figures go to data/results/   WORKERS=
# make vllm       an environment of its own for vLLM, which lab 06 compares with; Linux, 3.5 GB (more for a GPU)
# make notebooks  run the notebooks in place and keep their outputs (authors)
# make docs       write the kill table, the teaching guide, the claims, the README's picture and badges anew (authors)
# make verify     run all editions' notebooks of this commit under strict nbval, keep the JUnit (authors)   JUNIT=
# make release    dist/VERSION from this commit (authors)   VERSION= JUNIT= GPU=1
# make publish    put dist/VERSION on GitHub, with its program gh (authors)   VERSION=
# make drift      make lock without KEEP, then make test: do the newest versions still serve? (CI, weekly)
# make site       build the site into build/site, without network; open build/site/index.html     SITE=
# make lock       renew requirements.lock with uv (authors)     KEEP=
# make clean      remove .venv, .venv-kvpress, .venv-vllm, tests/node/node_modules and build leftovers; keeps work/ and the model
#
# PYTHON=   the Python that makes .venv, 3.11 to 3.13
# PIP_ARGS= more arguments for pip, such as --index-url for a build of torch without CUDA
# LABKIT_BUSY=allow  let times be measured on a busy machine (notebooks, benchmarks); they say so
# PY=       a Python that has everything already (conda, a container): no .venv is made

PYTHON ?= python3
PY ?= .venv/bin/python
PIP_ARGS ?=
WORKERS ?= 2
SITE ?= build/site
ifeq ($(origin CHROMIUM),undefined)
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
endif

# An installation is fit for exactly these two files; their checksum is part of its stamp's name.
KEY := $(shell cat pyproject.toml requirements.lock | cksum | tr ' ' '-')
ifeq ($(value PY),.venv/bin/python)
LAB_READY := .venv/.lab-$(KEY)
TEST_READY := .venv/.test-$(KEY)
endif

# What tests need from npm. Where there is no npm they are skipped, and say so; with CI=true they fail.
NODE := tests/node
ifneq ($(shell command -v npm),)
NODE_READY := $(NODE)/.npm-$(shell cat $(NODE)/package.json $(NODE)/package-lock.json 2>/dev/null | cksum | tr ' ' '-')
endif

# What was given, as one word of the shell, whatever is in it: $(call one_word,NAME). A ~/ at its beginning is the home folder.
quoted = '$(subst ','\'',$(1))'
one_word = $(if $(filter ~/%,$(firstword $(value $(1)))),"$$HOME"/$(call quoted,$(subst <~/,,<$(value $(1)))),$(call quoted,$(value $(1))))
override PYTHON := $(call one_word,PYTHON)
override PY := $(call one_word,PY)
unexport PYTHON PY

# OpenMP threads that wait spin for milliseconds by default: on a busy machine two are then slower than one.
export GOMP_SPINCOUNT ?= 20000

NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=400 --nbval-kernel-startup-timeout=120 --timeout=600 \
	-p no:randomly -p no:cacheprovider
# Some shells and conda export a HOST that is no address: only one that was given to make, or is an address, counts.
LISTEN = $(if $(filter command%,$(origin HOST)),--host $(call one_word,HOST)) $(if $(PORT),--port $(call one_word,PORT))
# What a run of tests or notebooks must not depend on: the progress so far, the terminal's encoding.
SCRATCH = PYTHONIOENCODING=utf-8 LABKIT_PROGRESS="$$(mktemp -d)/progress.json"
# Sphinx counts its main process, which mostly waits while pages are written: one more than there are cores.
SPHINX_JOBS = $$(( $$(getconf _NPROCESSORS_ONLN) + 1 ))
# Labs that run side by side have a thread each: two that wait for each other on a core that is taken gain nothing.
# With WORKERS=1, and in `make verify`, they have all cores.
SHARED = $(if $(filter-out 0 1,$(value WORKERS)),LABKIT_THREADS=1)

.PHONY: setup verify release publish drift drift-issue lab test lint unit notebooks-test browser gpu vllm notebooks docs site lock clean

lab: $(LAB_READY)
	@$(PY) -m labkit.course.cli open $(LISTEN) $(ARGS)

setup: $(LAB_READY)
	@$(PY) -m labkit.course.cli model
	@$(PY) -m labkit.course.cli open --no-server

test: lint unit notebooks-test browser

lint: $(TEST_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m labkit.course.cli lint

unit: lint $(NODE_READY)
	$(PY) -m labkit.course.cli model
	TRITON_INTERPRET=1 $(SCRATCH) $(PY) -m pytest tests --ignore=tests/browser -n $(call one_word,WORKERS) --dist worksteal

# The longest notebooks are the last.
notebooks-test: unit
	$(SCRATCH) $(SHARED) $(PY) -m pytest $(NBVAL) -n $(call one_word,WORKERS) --dist loadfile --no-loadscope-reorder \
		$$(ls -r notebooks/*.ipynb)

browser: notebooks-test $(NODE_READY)
	@if [ -n $(call one_word,CHROMIUM) ]; then \
		CHROMIUM=$(call one_word,CHROMIUM) $(SHARED) $(PY) -m pytest tests/browser \
			-n $(call one_word,WORKERS) --dist worksteal; \
	else \
		echo "SKIPPED: the browser tests. They need Chromium: install it, or set CHROMIUM= to a browser." >&2; \
		[ "$$CI" != true ]; \
	fi

gpu: $(TEST_READY)
	-LABKIT_DEVICE=cuda $(PY) -m labkit.course.cli doctor
	$(SCRATCH) $(PY) -m benchmarks.on_gpu --workers $(call one_word,WORKERS)

vllm: .venv-vllm/.vllm-0.32.0
	@echo "vLLM is in .venv-vllm. Lab 06 starts it by itself."

notebooks: $(TEST_READY)
	LABKIT_DEVICE=cpu LABKIT_PROFILE=quick $(SCRATCH) $(PY) -m labkit.course.record notebooks/*.ipynb

docs: $(TEST_READY)
	$(PY) -m tests.labs.kill_table
	$(PY) -m labkit.course.editions.guide
	$(PY) -m labkit.claims
	$(PY) docs/pictures.py
	$(PY) docs/badges.py

JUNIT ?=
verify: $(TEST_READY)
	$(PY) -m labkit.course.cli model
	$(PY) -m labkit.course.cli verify $(if $(JUNIT),$(call one_word,JUNIT),dist/nbval.xml)

release: $(TEST_READY)
	$(PY) -m labkit.course.cli model
	$(PY) -m labkit.course.cli release $(call one_word,VERSION) $(if $(GPU),--gpu) $(if $(JUNIT),--junit $(JUNIT))

publish:
	gh release create v$(call one_word,VERSION) --verify-tag --notes-file dist/$(call one_word,VERSION)/VERIFIED.md dist/$(call one_word,VERSION)/*

drift: $(TEST_READY)
	$(PY) -m pip install --quiet uv
	PATH="$$PWD/.venv/bin:$$PATH" $(MAKE) lock KEEP=
	$(MAKE) test

# One open issue is enough: a second week of the same drift is a comment on it.
drift-issue:
	@open=$$(gh issue list --search 'in:title "Drift:"' --state open --json number --jq '.[0].number // empty'); \
	text="The labs do not hold with the newest versions that pyproject.toml allows. The run: $$RUN"; \
	if [ -n "$$open" ]; then gh issue comment "$$open" --body "$$text"; \
	else gh issue create --title "Drift: make test fails with the newest versions" --body "$$text"; fi

site: $(TEST_READY)
	$(PY) -m sphinx -W --keep-going -q -E -j $(SPHINX_JOBS) -b html -c docs -d $(call one_word,SITE)/../doctrees . $(call one_word,SITE)

# What stays when the lock is renewed: the results of other machines and the labs' pages are of this PyTorch.
KEEP ?= torch==2.13.0
lock:
	printf '%s\n' $(call one_word,KEEP) > .keep.tmp
	uv pip compile pyproject.toml --universal --python-version 3.11 --extra test --upgrade --constraint .keep.tmp \
		--no-annotate --no-header --no-emit-index-url --output-file .lock.tmp --quiet
	(echo '# Exact versions, used as constraints: pip install -c requirements.lock -e .    Made by: make lock'; \
		grep -v -E "^(nvidia|cuda)-|== '(win32|emscripten|nt)'" .lock.tmp) > requirements.lock
	rm .lock.tmp .keep.tmp

clean:
	rm -rf .venv .venv-kvpress .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		$(NODE)/node_modules $(NODE)/.npm-* $(NODE)/.lock

define RIGHT_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo $(PYTHON)" is not Python 3.11, 3.12 or 3.13: name one, as in  make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
endef

# Two that run at once set up one after the other; the second finds that there is nothing left to do.
ONCE := labkit/course/once.py

.venv/.made:
	$(RIGHT_PYTHON)
	$(PYTHON) $(ONCE) $@ $(PYTHON) -m venv .venv

.venv/.lab-$(KEY): .venv/.made
	$(PY) $(ONCE) $@ $(PY) -m pip install -c requirements.lock $(PIP_ARGS) -e .

.venv/.test-$(KEY): .venv/.made
	$(PY) $(ONCE) $@ $(PY) -m pip install -c requirements.lock $(PIP_ARGS) -e '.[test]'
	@touch .venv/.lab-$(KEY)

# Exactly what the lock file says, and none of the packages' own scripts. Tests get on without it outside CI.
$(NODE_READY): | $(TEST_READY)
	@$(PY) $(ONCE) $@ npm ci --prefix $(NODE) --ignore-scripts --engine-strict --no-audit --no-fund || { \
		echo "npm could not install what $(NODE)/package-lock.json names: the tests that need it are skipped." >&2; \
		[ "$$CI" != true ]; }

.venv-vllm/.vllm-0.32.0:
	$(RIGHT_PYTHON)
	@$(PYTHON) $(ONCE) $@ $(PYTHON) -P labkit/labs/lab06/vllm_environment.py .venv-vllm $(PIP_ARGS)
