# make demo     compare, export, ready to be served    make check    style, types, floors, spelling, docs
# make test     the test suite                       make docs     the documentation into site/
# make install  everything a developer needs         make clean    remove what these made, .venv included
#
# PYTHON=python3.12   the interpreter that makes .venv
# TORCH_INDEX=...     where torch comes from; https://download.pytorch.org/whl/cpu has the build without CUDA
# WORKERS=2           test processes
# PYTEST_ARGS=...     more for pytest, such as "-m 'not slow'" or "tests/unit -k metrics"

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# What torchrec needs on a CPU. torchrec itself is installed without its dependencies: they name the CUDA build.
TORCHREC_NEEDS := fbgemm-gpu-cpu pyre-extensions tensordict torchmetrics iopath tqdm

# mkdocs-material announces mkdocs 2 at every build otherwise.
export NO_MKDOCS_2_WARNING := 1

.PHONY: install demo test check docs clean

install: .venv/dev

.venv/base: pyproject.toml requirements.lock
	@test -x $(BIN)/python || { echo "making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "installing scalerec (most of the time goes to torch)"
ifneq ($(TORCH_INDEX),)
	@$(PIP) install --index-url $(TORCH_INDEX) $$(grep '^torch==' requirements.lock)
endif
	@$(PIP) install -c requirements.lock -e '.[serve]'
	@touch $@

.venv/dev: .venv/base
	@echo "installing what tests, checks and docs need"
ifeq ($(shell uname -s),Linux)
	@$(PIP) install -c requirements.lock -e '.[dev,docs]' $(TORCHREC_NEEDS)
	@$(PIP) install -c requirements.lock --no-deps torchrec
else
	@$(PIP) install -c requirements.lock -e '.[dev,docs]'
endif
	@touch $@

demo: .venv/base
	$(BIN)/scalerec compare rankmixer_movielens_100k dcnv2_movielens_100k dlrm_mlp_movielens_100k --seeds 2 --workers 2 --out runs/demo
	$(BIN)/scalerec compare hstu_movielens_100k sasrec_movielens_100k --seeds 1 --workers 2 --training.epochs 10 --out runs/demo_retrieval
	rm -rf runs/bundles runs/state
	$(BIN)/scalerec export runs/demo/rankmixer_movielens_100k/seed-0 --out runs/bundles/rankmixer --state runs/state
	$(BIN)/scalerec export runs/demo_retrieval/hstu_movielens_100k/seed-0 --out runs/bundles/hstu --state runs/state
	@echo
	@echo "See it work: run the next line and open the address that it prints."
	@echo "$(BIN)/scalerec serve runs/bundles/rankmixer runs/bundles/hstu --state runs/state"

# One thread a process: with more, the processes fight for the cores.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	@site=$$(mktemp -d); trap 'rm -rf "$$site"' EXIT; \
		$(BIN)/mkdocs build --strict --site-dir "$$site"

docs: .venv/dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs site dist build .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
