# Thin lines over .venv/bin. `make check` is what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test fmt lint types cov check docs docs-check bench bench-enrichment bench-findings crash-test cluster-tools test-cluster test-promql tools chart chart-test k8s k8s-check lock clean

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
	$(BIN)/codespell forwarder tests bench docs helm README.md CHANGELOG.md

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

# A real control plane for the tests of the list/watch and of the chart, and kwok, whose nodes and pods only act: built from their
# Go modules, once (9 minutes on 2 cores).
TOOLS := .tools/bin
GO_TOOLS := tests/cluster/tools
ETCD := go.etcd.io/etcd/server/v3
CONTROL_PLANE := $(addprefix $(TOOLS)/,kube-apiserver kube-controller-manager kube-scheduler)
KWOK := sigs.k8s.io/kwok/cmd/kwok

# Built from a module they would call themselves v0.0.0-master, which no chart's kubeVersion lets in.
KUBERNETES := $(shell sed -n 's|^\tk8s.io/kubernetes v\([0-9.]*\).*|\1|p' $(GO_TOOLS)/kubernetes/go.mod)
KUBERNETES_PARTS := $(subst ., ,$(KUBERNETES))
KUBERNETES_FLAGS := $(foreach pair,gitVersion=v$(KUBERNETES) gitMajor=$(word 1,$(KUBERNETES_PARTS)) gitMinor=$(word 2,$(KUBERNETES_PARTS)),\
	-X k8s.io/component-base/version.$(pair))

.PHONY: chart-install-test force

cluster-tools: $(TOOLS)/etcd $(CONTROL_PLANE) $(TOOLS)/kwok

$(TOOLS)/etcd: $(GO_TOOLS)/etcd/go.mod $(GO_TOOLS)/etcd/go.sum
	$(call go_build,$(ETCD))

$(CONTROL_PLANE): $(GO_TOOLS)/kubernetes/go.mod $(GO_TOOLS)/kubernetes/go.sum .tools/kubernetes.flags
	$(call go_build,k8s.io/kubernetes/cmd/$(@F),$(KUBERNETES_FLAGS))

$(TOOLS)/kwok: $(GO_TOOLS)/kwok/go.mod $(GO_TOOLS)/kwok/go.sum
	$(call go_build,$(KWOK))

# Written only where it changes: what was built with other flags is built again.
.tools/kubernetes.flags: force
	@mkdir -p $(@D)
	@echo '$(strip $(KUBERNETES_FLAGS))' | cmp -s - $@ || echo '$(strip $(KUBERNETES_FLAGS))' > $@

# In the directory of the module: a go.work of a parent directory has no say, and no git repository is needed.
define go_build
	@command -v go > /dev/null || { echo 'make: $@ is built with Go, and there is no `go` in PATH: install Go 1.26 or newer' >&2; exit 1; }
	@mkdir -p $(@D)
	cd $(<D) && GOWORK=off go build -mod=readonly -buildvcs=false -trimpath -ldflags="-s -w $(2)" -o $(abspath $@) $(1)
endef

test-cluster: setup cluster-tools
	$(BIN)/pytest -m cluster --timeout 600 -v $(ARGS)

# The chart installed on a real control plane, and a rolling restart under load. A missing tool is an error.
chart-install-test: setup cluster-tools $(TOOLS)/helm
	$(BIN)/pytest tests/cluster/install_checks.py tests/cluster/rolling_checks.py --timeout 300 -v $(ARGS)

# Helm, helm-unittest, kubeconform, kube-score and kustomize, from their Go modules, and the schemas of Kubernetes' objects (4 minutes
# on 2 cores, once).
CHART_TOOLS := tests/chart/tools
SCHEMAS := .tools/schemas/complete

# Helm renders for the Kubernetes it was linked for; without that it says 1.20.
HELM_KUBERNETES := $(foreach package,chartutil lint/rules,\
	-X helm.sh/helm/v3/pkg/$(package).k8sVersionMajor=1 -X helm.sh/helm/v3/pkg/$(package).k8sVersionMinor=36)

tools: $(addprefix $(TOOLS)/,helm helm-unittest kubeconform kube-score kustomize) $(SCHEMAS)

$(TOOLS)/helm: $(CHART_TOOLS)/helm/go.mod $(CHART_TOOLS)/helm/go.sum
	$(call go_build,helm.sh/helm/v3/cmd/helm,$(HELM_KUBERNETES))

$(TOOLS)/kubeconform: $(CHART_TOOLS)/kubeconform/go.mod $(CHART_TOOLS)/kubeconform/go.sum
	$(call go_build,github.com/yannh/kubeconform/cmd/kubeconform)

$(TOOLS)/helm-unittest: $(CHART_TOOLS)/unittest/go.mod $(CHART_TOOLS)/unittest/go.sum
	$(call go_build,github.com/helm-unittest/helm-unittest/cmd/helm-unittest)

$(TOOLS)/kube-score: $(CHART_TOOLS)/kube-score/go.mod $(CHART_TOOLS)/kube-score/go.sum
	$(call go_build,github.com/zegl/kube-score/cmd/kube-score)

$(TOOLS)/kustomize: $(CHART_TOOLS)/kustomize/go.mod $(CHART_TOOLS)/kustomize/go.sum
	$(call go_build,sigs.k8s.io/kustomize/kustomize/v5)

$(SCHEMAS): tests/chart/schemas.txt tests/chart/schemas.py | $(STAMP)
	$(BIN)/python tests/chart/schemas.py

# The chart's values.schema.json, from values.yaml and the forwarder's settings.
chart: setup
	$(BIN)/python helm/schema.py

# Plain manifests, rendered from the chart.
k8s: setup $(TOOLS)/helm
	$(BIN)/python helm/k8s.py

k8s-check: setup $(TOOLS)/helm
	$(BIN)/python helm/k8s.py --check

# What the chart renders by default, as helm-unittest keeps it; look at the difference before it is committed.
.PHONY: chart-snapshots
chart-snapshots: setup tools
	$(TOOLS)/helm-unittest --strict -u helm/falco-aws-forwarder

# Everything about the chart that needs no cluster. A missing tool is an error.
CHART_CHECKS := $(addprefix tests/chart/,$(addsuffix _checks.py,alert chart delivery falco plain refusal secure spool tls tool))

chart-test: setup tools k8s-check
	@command -v curl > /dev/null || \
		{ echo 'make: Falco is played by curl, and there is none in PATH: install it (Debian: apt-get install curl)' >&2; exit 1; }
	$(BIN)/python helm/schema.py --check
	$(BIN)/pytest $(CHART_CHECKS) -q -n 2 --timeout 120 $(ARGS)

# The PromQL of docs/sensors.md: rules and their unit tests, run by Prometheus' own tool.
test-promql:
	@command -v promtool > /dev/null || { echo 'make: this is run by promtool, and there is none in PATH: install Prometheus (Debian: apt-get install prometheus)' >&2; exit 1; }
	promtool check rules tests/promql/sensors_rules.yaml
	promtool test rules tests/promql/sensors.yaml

# The AWS side (docs/aws, docs/validate.md): cfn-lint, the templates on moto, policies, queries and patterns against what really arrives.
.PHONY: aws-test
aws-test: setup
	@test -x $(BIN)/cfn-lint || { echo 'make: templates are checked with cfn-lint, and there is none in $(BIN): rm $(STAMP) && make setup' >&2; exit 1; }
	$(BIN)/pytest tests/aws_side/policies_checks.py tests/aws_side/templates_checks.py tests/aws_side/views_checks.py \
		tests/aws_side/validation_checks.py -q -n 2 --timeout 180 $(ARGS)

# Alerts and dashboards of the chart (docs/monitoring.md), on a real Prometheus that scrapes running replicas (half a minute).
.PHONY: dashboards dashboards-check monitoring-lock monitoring-pictures monitoring-test monitoring-tools
MONITORING_TOOLS := .tools/monitoring

monitoring-tools:
	@missing=$$(for program in prometheus promtool; do command -v $$program > /dev/null || echo $$program; done); \
	test -z "$$missing" || { echo "make: alerts and dashboards are tried with programs that are not in PATH:" $$missing \
		"(Debian: apt-get install --no-install-recommends prometheus)" >&2; exit 1; }

# The chart's files/dashboards/*.json.
dashboards: setup
	$(BIN)/python helm/dashboards/write.py

dashboards-check: setup
	$(BIN)/python helm/dashboards/write.py --check

MONITORING_CHECKS := $(addprefix tests/monitoring/,$(addsuffix _checks.py,alerts dashboards monitoring rendering runbooks))

monitoring-test: setup monitoring-tools $(TOOLS)/helm test-promql dashboards-check
	$(BIN)/pytest $(MONITORING_CHECKS) -q -n 2 --timeout 120 $(ARGS)

# docs/images: drawn from what the panels' queries say of a run of four minutes, by matplotlib from a lock of its own.
monitoring-pictures: setup monitoring-tools $(TOOLS)/helm $(MONITORING_TOOLS)/.installed
	$(BIN)/python tests/monitoring/pictures.py
	$(MONITORING_TOOLS)/bin/python tests/monitoring/draw.py

$(MONITORING_TOOLS)/.installed: tests/monitoring/tools.txt
	@rm -rf $(MONITORING_TOOLS)
	$(PYTHON) -m venv $(MONITORING_TOOLS)
	$(MONITORING_TOOLS)/bin/python -m pip install --quiet --require-hashes --no-deps -r tests/monitoring/tools.txt
	@touch $@

monitoring-lock: setup
	$(BIN)/uv pip compile -q --generate-hashes --universal --python-version 3.11 --no-header \
		tests/monitoring/tools.in -o tests/monitoring/tools.txt

# The image (docs/image.md). Wheels come from outside the build, every one by its hash; the project's own gets its own lock.
.PHONY: wheels image image-lint image-lock image-test image-test-tools sbom
IMAGE ?= falco-aws-forwarder
ENGINE ?= docker
BASE_IMAGE ?= python:3.14-slim-trixie
WHEELS := build/wheels
WHEELS_PYTHON ?= 3.14# of BASE_IMAGE
WHEELS_MACHINES ?= $(patsubst arm64,aarch64,$(shell uname -m))# more than one for an image of several architectures: x86_64 aarch64
WHEELS_LIBC := manylinux_2_28 manylinux_2_17 manylinux2014 manylinux_2_5 manylinux1
IMAGE_TOOLS := .tools/image
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' forwarder/__init__.py)

# Environment markers go: pip weighs them for the Python it runs on, not for the image's. One wheel too many harms nobody.
wheels: setup $(IMAGE_TOOLS)/.installed
	@rm -rf $(WHEELS) && mkdir -p $(WHEELS)
	@sed -E 's/ ; [^\\]+//' requirements/runtime.txt > build/runtime-everywhere.txt
	@for machine in $(WHEELS_MACHINES); do \
		$(IMAGE_TOOLS)/bin/python -m pip download --quiet --disable-pip-version-check --require-hashes --only-binary :all: --no-deps \
			--implementation cp --python-version $(WHEELS_PYTHON) $(foreach libc,$(WHEELS_LIBC),--platform $(libc)_$$machine) \
			--dest $(WHEELS) -r build/runtime-everywhere.txt || exit 1; \
	done
	@$(IMAGE_TOOLS)/bin/python -m pip download --quiet --disable-pip-version-check --require-hashes --only-binary :all: --no-deps \
		--dest $(WHEELS) -r $(IMAGE_TOOLS)/pip.txt
	@$(BIN)/python -m hatchling build -t wheel -d $(WHEELS) > build/wheel.log 2>&1 || { cat build/wheel.log >&2; exit 1; }
	@cd $(WHEELS) && sha256sum falco_aws_forwarder-*.whl | sed -E 's/^([0-9a-f]+) .*/falco-aws-forwarder==$(VERSION) --hash=sha256:\1/' > project.txt
	@echo "$(WHEELS): $$(ls $(WHEELS)/*.whl | wc -l) wheels for Python $(WHEELS_PYTHON) on $(WHEELS_MACHINES)"

# ENGINE is docker, podman or buildah; IMAGE_FLAGS go to its `build`.
image: wheels
	@command -v $(lastword $(ENGINE)) > /dev/null || { echo 'make: the image is built by $(ENGINE), and there is none in PATH: install it, or name another: make image ENGINE=podman' >&2; exit 1; }
	$(ENGINE) build $(IMAGE_FLAGS) --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$$(git describe --always --abbrev=40 --exclude '*' --dirty) --build-arg CREATED=$$(git log -1 --format=%cI) -t $(IMAGE) .

# Tools that are no part of the product, from a lock of their own.
$(IMAGE_TOOLS)/.installed: tests/image/tools.txt
	@rm -rf $(IMAGE_TOOLS)
	$(PYTHON) -m venv $(IMAGE_TOOLS)
	$(IMAGE_TOOLS)/bin/python -m pip install --quiet --require-hashes --no-deps -r tests/image/tools.txt
	@sed -n '/^pip==/,/^    # via/p' tests/image/tools.txt > $(IMAGE_TOOLS)/pip.txt
	@touch $@

image-lock: setup
	$(BIN)/uv pip compile -q --generate-hashes --universal --python-version 3.11 --no-header tests/image/tools.in -o tests/image/tools.txt

image-lint: $(IMAGE_TOOLS)/.installed
	$(IMAGE_TOOLS)/bin/hadolint --failure-threshold style Dockerfile

# CycloneDX of the distributions that are installed in the image: taken out of it, read by cyclonedx-py, which validates what it writes.
sbom: $(IMAGE_TOOLS)/.installed
	@command -v $(ENGINE) > /dev/null || { echo 'make: the image is read by $(ENGINE), and there is none in PATH: install it, or name another: make sbom ENGINE=podman' >&2; exit 1; }
	@rm -rf build/sbom && mkdir -p build/sbom
	@id=$$($(ENGINE) create $(IMAGE)) || exit 1; $(ENGINE) cp $$id:/opt/falco-forwarder/lib build/sbom/lib; code=$$?; $(ENGINE) rm $$id > /dev/null; exit $$code
	@$(PYTHON) -m venv --without-pip build/sbom/reader
	@realpath build/sbom/lib/python3*/site-packages > $$(echo build/sbom/reader/lib/python3*/site-packages)/image.pth
	@sed 's/^dynamic = \["version"\]/version = "$(VERSION)"/' pyproject.toml > build/sbom/pyproject.toml
	$(IMAGE_TOOLS)/bin/cyclonedx-py environment --pyproject build/sbom/pyproject.toml --mc-type application --output-reproducible \
		--spec-version 1.6 --output-format JSON --output-file build/sbom.json build/sbom/reader
	@rm -rf build/sbom

# Builds the image on a base made by debootstrap (no registry of images is asked), without a network, and runs it as Kubernetes
# would. Needs root.
IMAGE_TEST_BASE := localhost/falco-forwarder-test-base
IMAGE_TEST_SUITE ?= bookworm# of Debian
IMAGE_TEST_PYTHON ?= 3.11# of that suite
IMAGE_TEST_PROGRAMS := buildah debootstrap podman runc

image-test-tools:
	@missing=$$(for program in $(IMAGE_TEST_PROGRAMS); do command -v $$program > /dev/null || echo $$program; done); \
	test -z "$$missing" || { echo "make: the image is tried with programs that are not in PATH:" $$missing "(Debian: apt-get install --no-install-recommends $(IMAGE_TEST_PROGRAMS))" >&2; exit 1; }
	@test "$$(id -u)" = 0 || { echo 'make: debootstrap and the container of the test need root' >&2; exit 1; }

build/image/$(IMAGE_TEST_SUITE).tar: | image-test-tools
	@rm -rf build/image/root && mkdir -p build/image
	debootstrap --variant=minbase --include=ca-certificates,python3 $(IMAGE_TEST_SUITE) build/image/root > build/image/debootstrap.log || { tail -5 build/image/debootstrap.log >&2; exit 1; }
	@tar -C build/image/root --exclude='./var/cache/apt/*' --exclude='./var/lib/apt/lists/*' --exclude='./usr/share/doc/*' \
		--exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' --exclude='./dev/*' -cf $@.new . && mv $@.new $@
	@rm -rf build/image/root

image-test: setup image-test-tools image-lint build/image/$(IMAGE_TEST_SUITE).tar
	@podman rmi --ignore localhost/falco-aws-forwarder:test $(IMAGE_TEST_BASE) > /dev/null
	@podman import --quiet build/image/$(IMAGE_TEST_SUITE).tar $(IMAGE_TEST_BASE) > /dev/null
	$(MAKE) image ENGINE='unshare --net buildah' IMAGE_FLAGS='--isolation chroot --pull-never' IMAGE=localhost/falco-aws-forwarder:test WHEELS_PYTHON=$(IMAGE_TEST_PYTHON) \
		BASE_IMAGE=$(IMAGE_TEST_BASE)@$$(podman image inspect --format '{{.Digest}}' $(IMAGE_TEST_BASE))
	$(MAKE) sbom ENGINE=podman IMAGE=localhost/falco-aws-forwarder:test
	$(BIN)/pytest tests/image/image.py --timeout 600 -v -rP $(ARGS)

lock: setup
	$(BIN)/uv pip compile -q --generate-hashes --universal --python-version 3.11 --no-header requirements/runtime.in -o requirements/runtime.txt
	$(BIN)/uv pip compile -q --generate-hashes --universal --python-version 3.11 --no-header requirements/dev.in -o requirements/dev.txt

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .coverage*
