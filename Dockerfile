# Built by `make image`, tried by `make image-test`; docs/image.md says what is in it and why.
# Nothing is fetched while it is built: `make wheels` puts the wheels of the lock into build/wheels before.

# Any image with Python 3.11 or newer, its ssl and sqlite3, and CA certificates; both stages use it, so that the
# interpreter is where the virtual environment looks for it. A release names it by digest: image@sha256:...
ARG BASE_IMAGE=python:3.14-slim-trixie

FROM ${BASE_IMAGE} AS build
COPY requirements/runtime.txt /build/runtime.txt
COPY build/wheels /build/wheels
# pip runs from its own wheel: neither the base nor the image has to have one.
RUN set -eu; \
    python3 -m venv --without-pip /opt/falco-forwarder; \
    set -- /build/wheels/pip-*.whl; \
    export PYTHONPATH="$1"; \
    for lock in /build/runtime.txt /build/wheels/project.txt; do \
        /opt/falco-forwarder/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check \
            --no-index --find-links /build/wheels --require-hashes --only-binary :all: --no-deps --no-compile -r "$lock"; \
    done; \
    /opt/falco-forwarder/bin/python -m pip check --disable-pip-version-check
# The SDK brings models of some 430 services; these are the ones it makes clients for here (EC2, EKS and IMDS are asked
# without one). `make image-test` compares the list with the code. Then the directory of the spool.
RUN set -eu; \
    find /opt/falco-forwarder/lib/python3*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name ecs ! -name logs ! -name securityhub ! -name sts -exec rm -r {} +; \
    find /opt/falco-forwarder/lib/python3*/site-packages/botocore/data -name 'examples-*.json' -delete; \
    find /opt/falco-forwarder -name __pycache__ -exec rm -r {} +; \
    install -d -m 0750 /state/falco-forwarder
# Bytecode, as nobody can write it later: of all packages, and of what the program imports of the standard library (images
# of Python come without). In a tree of its own, wherever the base keeps its library, and valid by what it was made
# from, whatever times a registry or an unpacker gives to files.
ENV PYTHONPYCACHEPREFIX=/opt/falco-forwarder/bytecode
RUN set -eu; \
    /opt/falco-forwarder/bin/python -B -c 'import forwarder, importlib, pkgutil, sys; \
        [importlib.import_module(found.name) for found in pkgutil.walk_packages(forwarder.__path__, "forwarder.")]; \
        files = {getattr(module, "__file__", None) or "" for module in sys.modules.values()}; \
        print("\n".join(sorted(file for file in files if file.endswith(".py"))))' > /build/imported; \
    /opt/falco-forwarder/bin/python -B -m compileall -qq -f --invalidation-mode unchecked-hash -i /build/imported /opt/falco-forwarder/lib

# No RUN from here on: the final stage needs no shell to be built, and the program none to run.
FROM ${BASE_IMAGE}
COPY --from=build /opt/falco-forwarder /opt/falco-forwarder
COPY --from=build --chown=65532:65532 /state/ /var/lib/
ENV PATH=/opt/falco-forwarder/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPYCACHEPREFIX=/opt/falco-forwarder/bytecode \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
# Where a root file system that is read only leaves nowhere else to write, temporary files go here.
WORKDIR /var/lib/falco-forwarder
USER 65532:65532
EXPOSE 2801 8080
ENTRYPOINT ["/opt/falco-forwarder/bin/falco-forwarder"]
CMD ["run"]

ARG BASE_IMAGE
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="falco-aws-forwarder" \
      org.opencontainers.image.description="Carries Falco alerts to CloudWatch Logs and AWS Security Hub without losing one that was acknowledged" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
