"""Run by `helm test`: posts an alert to every replica, and waits until each says that its sinks have settled it.

Arguments: host of the headless Service, receiver's port, admin port, seconds, and how many replicas there must be at least (0: as many
as DNS says; a pod that waits to be scheduled is not in it). Standard library only. In the environment, where the receiver has TLS
or authentication: TLS_NAME (the name its certificate is for), CA_FILE, CLIENT_AUTH (it wants to see a certificate),
CLIENT_DIRECTORY (ours), CREDENTIALS_FILE. A file that is not there was not in its Secret. Where a replica fails, CONFIG_FILE is
checked: a pod that does not start for a fault in it answers nobody.
"""

# ruff: noqa: T201 - prints for `helm test --logs`

import base64
import datetime as dt
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

OK = 200


class Secured(http.client.HTTPConnection):
    """TLS to a pod's address, with the Service's name: no certificate has addresses of pods."""

    def __init__(self, address: str, port: int, context: ssl.SSLContext, name: str) -> None:
        super().__init__(address, port, timeout=10)
        self.context, self.name = context, name

    def connect(self) -> None:
        super().connect()
        self.sock = self.context.wrap_socket(self.sock, server_hostname=self.name)


def context() -> ssl.SSLContext:
    authorities = os.environ.get("CA_FILE", "")
    made = ssl.create_default_context(cafile=authorities if Path(authorities).is_file() else None)
    if folder := os.environ.get("CLIENT_DIRECTORY"):
        made.load_cert_chain(f"{folder}/tls.crt", f"{folder}/tls.key")
    return made


def receiver(address: str, port: int) -> http.client.HTTPConnection:
    name = os.environ.get("TLS_NAME")
    if name is None:
        return http.client.HTTPConnection(address, port, timeout=10)
    return Secured(address, port, context(), name)


def credentials() -> dict[str, str]:
    """The header for the first line of the file: it may be one that is not taken for much longer."""
    file = os.environ.get("CREDENTIALS_FILE")
    if file is None:
        return {}
    lines = [line.strip() for line in Path(file).read_text("utf-8-sig").splitlines()]
    given = [line for line in lines if line and not line.startswith("#")]
    return {"Authorization": f"Basic {base64.b64encode(given[0].encode()).decode()}"}


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: str | None = None, **more: str
) -> tuple[int, bytes]:
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **more})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def sinks(address: str, admin: int) -> dict[str, Any]:
    status, body = ask(http.client.HTTPConnection(address, admin, timeout=10), "GET", "/status")
    if status != OK:
        raise ValueError(f"/status answers {status}")
    found: dict[str, Any] = json.loads(body)["sinks"]
    return found


def settled(sink: dict[str, Any]) -> int:
    return int(sink["delivered"] + sink["filtered"] + sink["dead_letters"])


def alert() -> dict[str, Any]:
    now = dt.datetime.now(dt.UTC)
    stamp = now.strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
    fields = {
        "container.id": "host",
        "container.name": "host",
        "evt.time": int(now.timestamp() * 1e9),
        "fd.name": "/etc/shadow",
        "proc.cmdline": "cat /etc/shadow",
        "proc.name": "cat",
        "proc.pname": "sh",
        "user.name": "root",
    }
    return {
        "hostname": socket.gethostname(),
        "output": f"{stamp}: Notice A test of falco-aws-forwarder, not an incident (user=root file=/etc/shadow command=cat /etc/shadow)",
        "output_fields": fields,
        "priority": "Notice",
        "rule": "Test of falco-aws-forwarder",
        "source": "syscall",
        "tags": ["falco-aws-forwarder", "test"],
        "time": stamp,
    }


def test(address: str, port: int, admin: int, deadline: float) -> str:
    """What is wrong with this replica, or nothing."""
    before = sinks(address, admin)
    status, body = ask(receiver(address, port), "POST", "/", json.dumps(alert()), **credentials())
    if status != OK:
        return f"the alert was answered {status}: {body.decode(errors='replace').strip()}"
    # A sink settles alerts in their order: ours is done once as many are as were there when it was acknowledged.
    targets = {name: settled(sink) + sink["pending"] for name, sink in sinks(address, admin).items()}
    while True:
        now = sinks(address, admin)
        waiting = [name for name, sink in now.items() if sink["pending"] and settled(sink) < targets[name]]
        if not waiting:
            break
        if time.monotonic() > deadline:
            return "; ".join(
                f"{name} is {now[name]['state']}, {now[name]['pending']} wait: {now[name]['last_error']}"
                for name in waiting
            )
        time.sleep(0.5)
    for name, sink in now.items():
        rejected = sink["dead_letters"] - before[name]["dead_letters"]
        if rejected:
            return f"{name}: {rejected} dead letter(s), see /dead-letters: {sink['last_error']}"
        delivered, filtered = (sink[key] - before[name][key] for key in ("delivered", "filtered"))
        counted = (
            ""
            if not sink["aggregating"]
            else f", {sink['aggregating']} counted for the next update of a finding"
        )
        print(f"{address} {name}: {delivered} delivered, {filtered} filtered{counted}")
    return ""


def faults() -> str:
    """Every fault of the configuration, as the pods that do not start have logged them; nothing where it has none."""
    file = os.environ.get("CONFIG_FILE")
    if file is None:
        return ""
    # In the forwarder's pods the region comes from elsewhere: by the role's web hook, or from the instance.
    environment = {"AWS_REGION": "unknown", **os.environ}
    command = [sys.executable, "-m", "forwarder", "check", "--config", file]
    done = subprocess.run(  # noqa: S603 - our own program
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    return done.stderr.strip() if done.returncode else ""


def tried(address: str, port: int, admin: int, deadline: float) -> bool:
    """Whether this replica, by this address of it, delivers; says so where it does not."""
    try:
        trouble = test(address, port, admin, deadline)
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        trouble = f"{type(error).__name__}: {error}"
    if trouble:
        print(f"{address} FAILED: {trouble}")
    return not trouble


def main(host: str, port: str, admin: str, seconds: str, replicas: str) -> int:
    deadline = time.monotonic() + float(seconds)
    if os.environ.get("CLIENT_AUTH") and not os.environ.get("CLIENT_DIRECTORY"):
        print(
            "FAILED: senders must show a certificate (tls.clientAuth), and this test has none: set tls.testClientSecret"
        )
        return 1
    try:
        found = socket.getaddrinfo(host, int(admin), type=socket.SOCK_STREAM)
    except OSError as error:
        print(f"{host}: {error}\n{faults()}".strip())
        return 1
    # Of each family by itself: on dual stack a replica has an address of either, and must answer at both.
    there: Counter[int] = Counter()
    good: Counter[int] = Counter()
    for family, address in sorted({(int(item[0]), str(item[4][0])) for item in found}):
        there[family] += 1
        good[family] += tried(address, int(port), int(admin), deadline)
    seen, delivered = max(there.values()), min(good.values())
    wanted = max(seen, int(replicas))
    if delivered < wanted and (told := faults()):
        print(told)
    if seen < wanted:
        print(f"{wanted - seen} of {wanted} replicas have no address: what do their pods wait for?")
    print(f"{delivered} of {wanted} replicas delivered the test alert")
    return 0 if delivered == wanted else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
