"""TLS, client certificates, passwords and their Secrets in what the chart renders. Run by `make chart-test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from forwarder.settings import load_settings
from tests.chart.rendering import (
    CHART,
    EVERYTHING,
    LOGS,
    NAMESPACE,
    RELEASE,
    Object,
    configuration,
    container,
    objects_of,
    one,
    workload,
)

PLAIN = CHART / "ci/default-values.yaml"
OWN = CHART / "ci/tls-values.yaml"
ISSUED = CHART / "ci/mtls-certmanager-values.yaml"
SECURED = pytest.mark.parametrize("case", [OWN, ISSUED, EVERYTHING], ids=lambda path: path.stem)


@SECURED
def test_the_configuration_names_files_that_are_mounted(case: Path) -> None:
    """And no other: each file of receiver.tls and receiver.auth comes from a Secret, whole directories at a time."""
    objects = objects_of(case)
    receiver = configuration(objects)["receiver"]
    wanted = {path for section in ("tls", "auth") for path in receiver.get(section, {}).values()}
    assert wanted == _files(objects)
    assert all("subPath" not in mount for mount in container(objects)["volumeMounts"])
    for volume in _secrets(workload(objects)["spec"]["template"]["spec"]).values():
        assert volume["defaultMode"] == 0o440


def test_without_tls_nothing_is_mounted(tmp_path: Path) -> None:
    objects = objects_of(PLAIN)
    assert _files(objects) == set()
    assert "receiver" not in configuration(objects)
    assert one(objects, "Service", RELEASE)["spec"]["ports"][0]["appProtocol"] == "http"
    assert not [it for it in objects if it["kind"] == "Certificate"]


@pytest.mark.parametrize(("switch", "key"), [("false", ""), ("true", "/etc/falco-forwarder-tls/ca.crt")])
def test_who_must_show_a_certificate(switch: str, key: str, tmp_path: Path) -> None:
    """Read by the forwarder."""
    sets = [LOGS, f"tls.enabled=true,tls.existingSecret=x,tls.clientAuth={switch}"]
    file = tmp_path / "forwarder.yaml"
    file.write_text(one(objects_of(None, sets=sets), "ConfigMap")["data"]["forwarder.yaml"])
    tls = load_settings(file, {"AWS_REGION": "eu-west-1", "FORWARDER__AWS__REGION": "eu-west-1"}).receiver.tls
    assert tls.cert_file == "/etc/falco-forwarder-tls/tls.crt"
    assert tls.client_ca_file == key


def test_key_of_the_credentials_may_have_any_name() -> None:
    volumes = _secrets(workload(objects_of(OWN))["spec"]["template"]["spec"])
    assert volumes["auth"]["items"] == [{"key": "htpasswd.txt", "path": "credentials"}]
    assert volumes["auth"]["secretName"] == "forwarder-senders"


def test_certificate_has_every_name_a_sender_may_use() -> None:
    objects = objects_of(ISSUED)
    server = one(objects, "Certificate", RELEASE)["spec"]
    service, headless = f"{RELEASE}.{NAMESPACE}", f"*.{RELEASE}-headless.{NAMESPACE}"
    assert server["dnsNames"] == [
        RELEASE,
        service,
        f"{service}.svc",
        f"{service}.svc.cluster.local",
        f"{headless}.svc",
        f"{headless}.svc.cluster.local",
        "falco.example.com",
    ]
    assert "server auth" in server["usages"]
    assert server["issuerRef"] == {"group": "cert-manager.io", "kind": "ClusterIssuer", "name": "ci"}
    volumes = _secrets(workload(objects)["spec"]["template"]["spec"])
    assert volumes["tls"]["secretName"] == server["secretName"]
    domain = one(objects_of(ISSUED, sets=["clusterDomain=x.y"]), "Certificate", RELEASE)["spec"]
    assert f"{service}.svc.x.y" in domain["dnsNames"]


def test_client_certificate_is_for_the_test() -> None:
    client = one(objects_of(ISSUED), "Certificate", "-client")["spec"]
    assert client["usages"] == ["digital signature", "client auth"]
    assert _secrets(one(objects_of(ISSUED), "Pod")["spec"])["client"]["secretName"] == client["secretName"]
    for sets in ("tls.clientAuth=false", "tls.certManager.clientCertificate=false"):
        objects = objects_of(ISSUED, sets=[sets])
        assert len([it for it in objects if it["kind"] == "Certificate"]) == 1
        assert "client" not in _secrets(one(objects, "Pod")["spec"])


def test_the_test_gets_no_key_of_the_receiver() -> None:
    """Of the receiver's Secret only the authority; of the client's its own pair."""
    for case in (OWN, ISSUED, EVERYTHING):
        pod = one(objects_of(case), "Pod")["spec"]
        volumes = _secrets(pod)
        assert volumes["ca"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
        assert volumes["ca"]["optional"] is True
        mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {*volumes, "config"}
    told = {
        it["name"]: it["value"] for it in one(objects_of(EVERYTHING), "Pod")["spec"]["containers"][0]["env"]
    }
    assert told["TLS_NAME"] == f"{RELEASE}.security.svc"
    assert told["CLIENT_AUTH"] == "true"
    plain = one(objects_of(PLAIN), "Pod")["spec"]["containers"][0]["env"]
    assert [it["name"] for it in plain] == ["CONFIG_FILE"]


@SECURED
def test_service_says_https(case: Path) -> None:
    services = [it for it in objects_of(case) if it["kind"] == "Service"]
    protocols = {port["name"]: port["appProtocol"] for it in services for port in it["spec"]["ports"]}
    assert protocols == {"http": "https", "admin": "http"}


def _secrets(pod: Object) -> dict[str, Object]:
    return {it["name"]: it["secret"] for it in pod.get("volumes", []) if "secret" in it}


def _files(objects: list[Object]) -> set[str]:
    """Where the forwarder's container finds the Secrets' files."""
    volumes = _secrets(workload(objects)["spec"]["template"]["spec"])
    return {
        f"{mount['mountPath']}/{item['path']}"
        for mount in container(objects)["volumeMounts"]
        for item in volumes.get(mount["name"], {}).get("items", [])
    }
