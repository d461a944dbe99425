"""What the chart refuses: by its schema with the path of the value, and what makes no sense together. Run by `make chart-test`."""

from __future__ import annotations

import pytest

from tests.chart.rendering import HUB, LOGS, helm

BAD = [
    ("colour=red", "additional properties 'colour' not allowed"),
    ("mode=deployment", "at '/mode': value must be one of 'statefulset', 'daemonset'"),
    ("replicas=0", "at '/replicas': minimum: got 0, want 1"),
    ("replicas=two", "at '/replicas': got string, want integer"),
    ("replicas=33", "at '/replicas': maximum: got 33, want 32"),
    ("resources.cpu=1", "at '/resources': additional properties 'cpu' not allowed"),
    ("image.repository=Example/X", "at '/image/repository': 'Example/X' does not match pattern"),
    ("image.digest=sha256:12", "at '/image/digest': 'sha256:12' does not match pattern"),
    ("image.pullPolicy=always", "at '/image/pullPolicy': value must be one of"),
    ("persistence.size=8G", "at '/persistence/size': '8G' does not match pattern"),
    ("spool.size=100", "at '/spool/size': got number, want string"),
    ("persistence.accessModes[0]=ReadWriteMany", "at '/persistence/accessModes/0': value must be one of"),
    ("service.port=70000", "at '/service/port': maximum: got 70,000, want 65,535"),
    ("service.typ=NodePort", "at '/service': additional properties 'typ' not allowed"),
    ("serviceAccount.annotations.a=1", "at '/serviceAccount/annotations/a': got number, want string"),
    ("networkPolicy.apiPorts[0]=https", "at '/networkPolicy/apiPorts/0': got string, want integer"),
    ("probes.liveness.path=/x", "at '/probes/liveness': additional properties 'path' not allowed"),
    ("tls.existingSecret=Mine", "at '/tls/existingSecret': 'Mine' does not match pattern"),
    ("tls.certManager.duration=90d", "at '/tls/certManager/duration': '90d' does not match pattern"),
    ("tls.certManager.renewBefore=720", "at '/tls/certManager/renewBefore': got number, want string"),
    ("tls.certManager.issuer=x", "at '/tls/certManager': additional properties 'issuer' not allowed"),
    ("tls.cert=x", "at '/tls': additional properties 'cert' not allowed"),
    ("auth.password=x", "at '/auth': additional properties 'password' not allowed"),
    ("auth.secretKey=a/b", "at '/auth/secretKey': 'a/b' does not match pattern"),
    ("autoscaling.maxReplicas=99", "at '/autoscaling/maxReplicas': maximum: got 99, want 32"),
    ("appArmorProfile.type=Default", "at '/appArmorProfile/type': value must be one of 'RuntimeDefault'"),
    ("service.ipFamilies[0]=IPv5", "at '/service/ipFamilies/0': value must be one of 'IPv4', 'IPv6'"),
    ("dnsConfig.ndots=2", "at '/dnsConfig': additional properties 'ndots' not allowed"),
    (
        "config.receiver.tls.certfile=/x",
        "at '/config/receiver/tls': additional properties 'certfile' not allowed",
    ),
    ("serviceMonitor.interval=30", "at '/serviceMonitor/interval': got number, want string"),
    ("daemonset.maxUnavailable=200%", "at '/daemonset/maxUnavailable': '200%' does not match pattern"),
    ("config.cluster.nmae=x", "at '/config/cluster': additional properties 'nmae' not allowed"),
    ("config.cluster.name=a b", "at '/config/cluster/name': 'a b' does not match pattern"),
    (
        "config.sinks.cloudwatch_logs.retention_days=91",
        "at '/config/sinks/cloudwatch_logs/retention_days': value must be one of 0, 1, 3, 5",
    ),
    ("config.cluster.account_id=12", "at '/config/cluster/account_id': got number, want string"),
    ("config.spool.sync=sometimes", "at '/config/spool/sync': value must be one of 'full', 'normal'"),
    ("config.spool.bytes_max=1Gi", "at '/config/spool/bytes_max': got string, want integer"),
    ("config.receiver.port=0", "at '/config/receiver/port': minimum: got 0, want 1"),
    (
        "config.sinks.securityhub.enabled=true",
        "at '/config/sinks': additional properties 'securityhub' not allowed",
    ),
    (
        "config.sinks.cloudwatch_logs.minimum_priority=severe",
        "at '/config/sinks/cloudwatch_logs/minimum_priority': value must be one of",
    ),
    (
        "config.sinks.cloudwatch_logs.log_group=a b",
        "at '/config/sinks/cloudwatch_logs/log_group': 'a b' does not match pattern",
    ),
    (
        "config.sinks.security_hub.rate_per_sec=0",
        "at '/config/sinks/security_hub/rate_per_sec': exclusiveMinimum: got 0, want 0",
    ),
    (
        "config.sinks.security_hub.aggregation.flush_secs=60",
        "at '/config/sinks/security_hub/aggregation/flush_secs': got number, want array",
    ),
    ("config.enrichment.kubernetes.enabled=maybe", "at '/config/enrichment/kubernetes/enabled'"),
    ("config.sensors.peers[0]=nowhere", "at '/config/sensors/peers/0': 'nowhere' does not match pattern"),
    ("config.rules[0].matches.rule=x", "at '/config/rules/0': additional properties 'matches' not allowed"),
    ("config.rules[0].silence.till=x", "additional properties 'till' not allowed"),
]


@pytest.mark.parametrize(("pair", "message"), BAD, ids=lambda it: it if "=" in it and " " not in it else "")
def test_schema_refuses(pair: str, message: str) -> None:
    done = helm("template", sets=[LOGS, pair])
    assert done.returncode != 0, done.stdout[:300]
    assert message in done.stderr, done.stderr


AUTOSCALED = "autoscaling.enabled=true,autoscaling.metrics[0].type=Resource"
ISSUED = "tls.enabled=true,tls.certManager.enabled=true,tls.certManager.issuerRef.name=x"
SENSELESS = [
    ([LOGS, "image.repository="], "image.repository: is required; the project publishes no image"),
    ([LOGS, "spool.size=511Mi"], "spool.size: 511Mi is less than 512Mi"),
    ([LOGS, "mode=daemonset,spool.size=100Mi"], "spool.size: 100Mi is less than 512Mi"),
    ([], "config.sinks: no sink is enabled"),
    (["config.sinks.cloudwatch_logs.enabled=true"], "config.sinks.cloudwatch_logs.log_group: is required"),
    (
        ["config.sinks.security_hub.enabled=true"],
        "config.cluster.name: is required where config.sinks.security_hub is enabled",
    ),
    ([LOGS, "config.admin.port=2801"], "config.admin.port: is the receiver's port too"),
    ([LOGS, "mode=daemonset,persistence.enabled=true"], "persistence.enabled: needs mode statefulset"),
    (
        [HUB, "mode=daemonset"],
        "daemonset.expectedNodes: is required where config.sinks.security_hub is enabled",
    ),
    ([LOGS, "daemonset.hostPath.enabled=true"], "daemonset.hostPath.enabled: needs mode daemonset"),
    (
        [LOGS, "config.spool.bytes_max=2147483648"],
        "config.spool.bytes_max: 2147483648 is more than three fifths of the volume of 2Gi (1288490188)",
    ),
    (
        [LOGS, "terminationGracePeriodSeconds=16"],
        "terminationGracePeriodSeconds: is less than 17, which preStopSleepSeconds and config.receiver.drain_delay_secs need",
    ),
    ([LOGS, "fullnameOverride=a.b"], 'fullnameOverride: "a.b" is no name of small letters'),
    ([LOGS, "namespaceOverride=A_b"], 'namespaceOverride: "A_b" is no name of small letters'),
    ([LOGS, "image.repository=r:5000/x:1"], "image.repository: r:5000/x:1 has a tag; that is image.tag"),
    (
        [LOGS, "mode=daemonset,daemonset.maxUnavailable=0"],
        "daemonset.maxUnavailable: 0 lets no pod be replaced",
    ),
    ([LOGS, "config.receiver.host=127.0.0.1"], "config.receiver.host: 127.0.0.1 is reached by nobody"),
    ([LOGS, "config.admin.host=localhost"], "config.admin.host: localhost is reached by nobody"),
    (
        [LOGS, "extraEnv[0].name=FORWARDER__RECEIVER__PORT,extraEnv[0].value=1"],
        "extraEnv: FORWARDER__RECEIVER__PORT would not be known to the Service",
    ),
    ([LOGS, "config.spool.directory=/tmp/"], "config.spool.directory: /tmp/ is something else's place"),
    (
        [LOGS, "podMonitor.enabled=true,serviceMonitor.enabled=true"],
        "podMonitor.enabled: together with serviceMonitor everything is scraped twice",
    ),
    ([LOGS, AUTOSCALED, "mode=daemonset"], "autoscaling.enabled: needs mode statefulset"),
    ([LOGS, "autoscaling.enabled=true"], "autoscaling.metrics: is required"),
    ([LOGS, AUTOSCALED, "autoscaling.minReplicas=9"], "autoscaling.minReplicas: is more than maxReplicas"),
    (
        [LOGS, AUTOSCALED, "persistence.enabled=true,persistence.whenScaled=Delete"],
        "persistence.whenScaled: Delete together with autoscaling loses",
    ),
    ([LOGS, "tls.enabled=true"], "tls.existingSecret: is required where tls is enabled"),
    ([LOGS, "tls.existingSecret=x"], "tls.existingSecret: needs tls.enabled"),
    ([LOGS, "tls.clientAuth=true"], "tls.clientAuth: needs tls.enabled"),
    ([LOGS, ISSUED, "tls.enabled=false"], "tls.certManager.enabled: needs tls.enabled"),
    ([LOGS, ISSUED, "tls.existingSecret=x"], "tls.existingSecret: together with tls.certManager.enabled"),
    ([LOGS, ISSUED, "tls.certManager.issuerRef.name="], "tls.certManager.issuerRef.name: is required"),
    ([LOGS, ISSUED, "tls.testClientSecret=x"], "tls.testClientSecret: needs tls.clientAuth"),
    ([LOGS, "config.receiver.tls.cert_file=/x"], "config.receiver.tls: is set by the chart; use tls"),
    (
        [LOGS, "config.receiver.auth.credentials_file=/x"],
        "config.receiver.auth: is set by the chart; use auth",
    ),
    (
        [LOGS, "auth.existingSecret=x,podSecurityContext.fsGroup=null"],
        "podSecurityContext.fsGroup: is required with tls or auth",
    ),
    ([LOGS, "service.nodePort=30000"], "service.nodePort: needs service.type NodePort or LoadBalancer"),
    (
        [LOGS, "service.loadBalancerSourceRanges[0]=10.0.0.0/8"],
        "service.loadBalancerSourceRanges: needs service.type LoadBalancer",
    ),
]


@pytest.mark.parametrize(("sets", "message"), SENSELESS, ids=[it[1].partition(":")[0] for it in SENSELESS])
def test_refuses_what_makes_no_sense(sets: list[str], message: str) -> None:
    done = helm("template", sets=sets)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr


def test_all_faults_at_once() -> None:
    done = helm(
        "template",
        sets=[
            "config.sinks.security_hub.enabled=true,config.admin.port=2801,podMonitor.enabled=true,serviceMonitor.enabled=true"
        ],
    )
    assert "3 fault(s) in the values" in done.stderr


def test_a_spool_that_is_no_empty_dir_may_be_smaller() -> None:
    """There the forwarder sees how much room there is, and takes no more."""
    for kept in ("persistence.enabled=true", "mode=daemonset,daemonset.hostPath.enabled=true"):
        done = helm("template", sets=[LOGS, "spool.size=100Mi", kept])
        assert done.returncode == 0, done.stderr
