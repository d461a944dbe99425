# Thin lines over .venv/bin. `make check` is what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test fmt lint types cov check docs docs-check bench bench-enrichment bench-findings crash-test cluster-tools test-cluster test-promql lock clean

setup: $(STAMP)

# Everything comes from the lock with hashes; the project itself is installed editable with the
# build tool of the lock, so that nothing unlocked is fetched.
$(STAMP): requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: setup
	@$(BIN)/falco-forwarder demo $(if $(KEEP),--keep,--once)

test: setup
	$(BIN)/pytest -n 3 --dist worksteal $(ARGS)

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/lint-imports > /dev/null || $(BIN)/lint-imports
	$(BIN)/codespell forwarder tests bench docs README.md CHANGELOG.md

types: setup
	$(BIN)/mypy

cov: setup
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n 3 --dist worksteal $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

docs: setup
	$(BIN)/python docs/generate.py

docs-check: setup
	$(BIN)/python docs/generate.py --check

check: lint types docs-check cov

bench: setup
	$(BIN)/python bench/run.py $(ARGS)

# What enrichment costs: memory and pauses with 10,000 pods, CPU an alert, answers with the API server stopped.
bench-enrichment: setup
	$(BIN)/python bench/enrichment.py $(ARGS)

# What rules and aggregation cost for each alert, and memory under a flood of distinct issues.
bench-findings: setup
	$(BIN)/python bench/rules.py
	$(BIN)/python bench/aggregation.py

# Kills real processes with SIGKILL, and cuts the power in simulation (needs a C compiler).
crash-test: setup
	$(BIN)/pytest -m crash --timeout 900 -v $(ARGS)

# A real etcd and kube-apiserver for the tests of the list/watch: built from their Go modules, once (4 minutes on 2 cores).
TOOLS := .tools/bin
GO_TOOLS := tests/cluster/tools
ETCD := go.etcd.io/etcd/server/v3
APISERVER := k8s.io/kubernetes/cmd/kube-apiserver

cluster-tools: $(TOOLS)/etcd $(TOOLS)/kube-apiserver

$(TOOLS)/etcd: $(GO_TOOLS)/etcd/go.mod $(GO_TOOLS)/etcd/go.sum
	$(call go_build,$(ETCD))

$(TOOLS)/kube-apiserver: $(GO_TOOLS)/kubernetes/go.mod $(GO_TOOLS)/kubernetes/go.sum
	$(call go_build,$(APISERVER))

# In the directory of the module: a go.work of a parent directory has no say, and no git repository is needed.
define go_build
	@command -v go > /dev/null || { echo 'make: $@ is built with Go, and there is no `go` in PATH: install Go 1.26 or newer' >&2; exit 1; }
	@mkdir -p $(@D)
	cd $(<D) && GOWORK=off go build -mod=readonly -buildvcs=false -trimpath -ldflags="-s -w" -o $(abspath $@) $(1)
endef

test-cluster: setup cluster-tools
	$(BIN)/pytest -m cluster --timeout 600 -v $(ARGS)

# The PromQL of docs/sensors.md: rules and their unit tests, run by Prometheus' own tool.
test-promql:
	@command -v promtool > /dev/null || { echo 'make: this is run by promtool, and there is none in PATH: install Prometheus (Debian: apt-get install prometheus)' >&2; exit 1; }
	promtool check rules tests/promql/sensors_rules.yaml
	promtool test rules tests/promql/sensors.yaml

lock: setup
	$(BIN)/uv pip compile -q --generate-hashes --universal --python-version 3.11 --no-header requirements/runtime.in -o requirements/runtime.txt
	$(BIN)/uv pip compile -q --generate-hashes --universal --python-version 3.11 --no-header requirements/dev.in -o requirements/dev.txt

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .coverage*
