# Everything for work on the project. On a fresh clone, `make serve` or `make test` does the whole set-up first;
# after that it does nothing but its job.

PYTHON ?= python3
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install serve test test-thorough test-floor conformance check format generate descriptor bench soak fuzz chaos lock picture baseline clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  ARGS="…" is passed on to serve, test, test-thorough, test-floor, conformance, bench, soak, chaos and lock; PYTHON=… is the interpreter to install with.'

install: .venv/.installed ## Build .venv with everything for work on the project

serve: .venv/.installed ## Run the server: make serve ARGS="--address 127.0.0.1:0"
	.venv/bin/flywheel-server $(ARGS)

# The tests run in several processes and start hundreds: each would compile all modules anew.
test test-thorough test-floor: export PYTHONDONTWRITEBYTECODE =

test: .venv/.installed ## Run the tests
	.venv/bin/pytest $(ARGS)

test-thorough: .venv/.installed .venv/.prometheus ## Run the further cases of what the tests try some of, such as each status of each request to Modal
	.venv/bin/pytest -m thorough $(ARGS)

# What would run twice with the same versions: the locks have one version of llama.cpp and one of Modal's library. The rest is about
# tools and files of contributors.
SAME_AT_FLOOR := tests/engines/llama_cpp tests/engines/modal tests/modal_cloud tests/benchmarks tests/chaos \
	tests/test_house.py tests/test_project_files.py

test-floor: .venv-floor/.installed ## Run the tests that depend on versions, with the lowest supported version of every dependency
	.venv-floor/bin/pytest $(SAME_AT_FLOOR:%=--ignore=%) $(ARGS)

conformance: .venv/.installed ## Print which engine honours which field: make conformance ARGS="--address HOST:PORT" adds a running server
	.venv/bin/python -m pytest -p tests.conformance.table -m "thorough or not thorough" -r N tests/conformance $(ARGS)

bench: .venv/.bench ## Measure the server beside others, for half an hour or more: make bench ARGS="--scenarios paced-64"
	.venv/bin/python -m benchmarks $(ARGS)

fuzz: .venv/.installed ## Fuzz the server, and abuse its HTTP/2 and the embedded engine, for some minutes
	.venv/bin/python -m fuzz

chaos: .venv/.installed ## Call a deployment on the stand-in of Modal while it fails, for up to ten minutes
	.venv/bin/python -m chaos $(ARGS)

soak: .venv/.installed ## Call a server for ten minutes, and look for what it holds on to
	.venv/bin/python -m benchmarks.soak $(ARGS)

# Prints the name of a step and its result; what the tool has to say only where it fails.
step = @printf '%-16s' '$(1)'; if out=$$({ $(2); } 2>&1); then echo ok; else echo FAILED; echo "$$out"; exit 1; fi

check: .venv/.installed .venv/.prometheus .venv-codegen/.installed ## Format, lint, types, layers, generated code, contract, alerts, locks
	$(call step,ruff format,.venv/bin/ruff format --check)
	$(call step,ruff check,.venv/bin/ruff check)
	$(call step,mypy,.venv/bin/mypy)
	$(call step,layers,.venv/bin/lint-imports --no-logo --no-cache layers.toml)
	$(call step,generated code,$(generate) --check)
	$(call step,buf lint,.venv/bin/buf lint)
	$(call step,buf format,.venv/bin/buf format --diff --exit-code)
	$(call step,buf breaking,.venv/bin/buf breaking --against proto/baseline.txtpb)
	$(call step,alerts,cd deploy/prometheus && $(CURDIR)/.venv/bin/promtool check config prometheus.yaml \
		&& $(CURDIR)/.venv/bin/promtool test rules alerts_test.yaml)
	$(call step,locks,.venv/bin/uv pip install --python .venv --offline --no-cache --dry-run --all-extras --group dev -r pyproject.toml \
		|| { echo 'Outdated: run make lock.'; false; })

format: .venv/.installed ## Format the code and the contract, and fix what can be fixed
	.venv/bin/ruff check --fix-only --quiet
	.venv/bin/ruff format
	.venv/bin/buf format --write

# protoc looks for its plugins in PATH.
generate = PATH="$(CURDIR)/.venv-codegen/bin:$$PATH" .venv-codegen/bin/python proto/generate.py

generate: .venv-codegen/.installed ## Generate flywheel_proto from the contract
	$(generate)

descriptor: .venv/.installed ## Write build/flywheel.v1.binpb, for tools that call the server without reflection
	.venv/bin/python proto/descriptor.py build/flywheel.v1.binpb

# The contract as it was last released. `make check` compares with it, so it moves at a release and at no other time: moved
# along with a change, it would let every break pass. It is text, so that its diff shows what a release changes for callers.
baseline: .venv/.installed ## At a release: make today's contract the one that must not break
	.venv/bin/buf build --exclude-source-info --output proto/baseline.txtpb

# Locks name versions and hashes for every platform and every Python from 3.11 on, and no index. Versions stay where they
# are unless pyproject.toml rules them out: `make lock ARGS=--upgrade` brings them up to date.
compile = .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url

lock: .venv/.installed ## Bring requirements/*.txt in line with pyproject.toml
	$(compile) $(ARGS) --all-extras --group dev pyproject.toml --output-file requirements/dev.txt
	$(compile) $(ARGS) --all-extras --group test --resolution lowest-direct pyproject.toml --output-file requirements/floor.txt
	$(compile) $(ARGS) --constraint requirements/dev.txt --group bench --output-file requirements/bench.txt
	$(compile) $(ARGS) requirements/codegen.in --output-file requirements/codegen.txt
	$(compile) $(ARGS) requirements/modal-build.in --output-file requirements/modal-build.txt
	$(compile) $(ARGS) --constraint requirements/dev.txt --extra server --extra otel pyproject.toml --output-file requirements/modal-gateway.txt
	$(compile) $(ARGS) --constraint requirements/dev.txt --extra embedded --extra otel pyproject.toml --output-file requirements/modal-model.txt
	$(compile) $(ARGS) --constraint requirements/dev.txt --extra server --extra hub pyproject.toml --output-file requirements/modal-hub.txt

picture: .venv/.installed ## Draw the pictures in docs anew, which show what `flywheel generate` and `flywheel top` print
	.venv/bin/python -m docs.picture
	.venv/bin/python -m docs.top_pictures

clean: ## Remove environments, caches and builds
	rm -rf $(ENVIRONMENTS) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find client proto server tests benchmarks chaos docs examples fuzz -name __pycache__ -prune -exec rm -rf {} +

# Environments. Each is made anew from its locks. The stamp is written last, so that an interrupted one is begun again, and
# holds the folder's path, as the environment itself does: one that was moved or copied is made anew too.

ENVIRONMENTS := .venv .venv-floor .venv-codegen
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: $(foreach env,$(ENVIRONMENTS),$(if $(filter $(CURDIR),$(shell cat $(env)/.locked 2>/dev/null)),,$(env)/.locked))

# A link to the interpreter: when that is removed or replaced, the environment is of no use.
$(ENVIRONMENTS:%=%/bin/python): ;

.venv/.locked: requirements/dev.txt requirements/model.txt
.venv-floor/.locked: requirements/floor.txt requirements/model.txt
.venv-codegen/.locked: requirements/codegen.txt
.venv-floor/.locked .venv-codegen/.locked: newest = 13# the oldest supported grpcio has no wheel for a later one
$(ENVIRONMENTS:%=%/.locked): %/.locked: %/bin/python
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $(or $(newest),99)))' || \
		{ echo '$* needs Python 3.11 $(if $(newest),to 3.$(newest),or newer), "$(PYTHON)" is none: try make $(MAKECMDGOALS) PYTHON=python3.11' >&2; exit 1; }
	$(PYTHON) -m venv --clear $*
	$*/bin/pip install --no-deps --only-binary :all: --require-hashes $(patsubst %,--requirement %,$(filter requirements/%,$^))
	@echo '$(CURDIR)' > $@

# The project itself, without the index: what builds it is in the lock.
.venv/.installed .venv-floor/.installed: %/.installed: %/.locked pyproject.toml
	$*/bin/pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	@touch $@

# What only the benchmarks need, the Go toolchain among it, comes on top.
.venv/.bench: requirements/bench.txt .venv/.installed
	.venv/bin/pip install --quiet --no-deps --only-binary :all: --require-hashes --requirement $<
	@touch $@

# Prometheus and its tool come on top.
.venv/.prometheus: deploy/prometheus/install.sh .venv/.locked
	$< .venv/bin
	@touch $@

.venv-codegen/.installed: .venv-codegen/.locked
	@touch $@
