"""One API server per session, a namespace per test; a whole control plane per session for the checks of the chart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.cluster.account import ServiceAccount, service_account
from tests.cluster.control_plane import ControlPlane
from tests.cluster.harness import Cluster

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A started cluster. A test may restart the API server or compact etcd; it starts what it stopped."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A new namespace, which goes with all it has."""
    if not cluster.apiserver.running:
        cluster.start()  # a test before this one failed while it was stopped
    name = cluster.make_namespace(f"test-{next(_numbers)}")
    yield name
    if not cluster.apiserver.running:
        cluster.start()
    cluster.drop_namespace(name)


@pytest.fixture
def account(cluster: Cluster, namespace: str) -> Iterator[ServiceAccount]:
    """The forwarder's ServiceAccount, with the rules of the chart and no others."""
    with service_account(cluster, namespace) as made:
        yield made


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A whole control plane, for the checks that install the chart."""
    with ControlPlane(tmp_path_factory.mktemp("plane")) as started:
        yield started
