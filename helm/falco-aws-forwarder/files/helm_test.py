"""Run by `helm test`: posts an alert to every replica, and waits until each says that its sinks have settled it.

Arguments: host of the headless Service, receiver's port, admin port, seconds. Standard library only.
"""

# ruff: noqa: T201 - prints for `helm test --logs`

import datetime as dt
import http.client
import json
import socket
import sys
import time
from typing import Any

OK = 200


def ask(address: str, port: int, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, port, timeout=10)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def sinks(address: str, admin: int) -> dict[str, Any]:
    status, body = ask(address, admin, "GET", "/status")
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
    status, body = ask(address, port, "POST", "/", json.dumps(alert()))
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


def main(host: str, port: str, admin: str, seconds: str) -> int:
    deadline = time.monotonic() + float(seconds)
    try:
        found = socket.getaddrinfo(host, int(admin), type=socket.SOCK_STREAM)
    except OSError as error:
        raise SystemExit(f"{host}: {error}") from None
    addresses = sorted({str(item[4][0]) for item in found})
    failed = 0
    for address in addresses:
        try:
            trouble = test(address, int(port), int(admin), deadline)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            trouble = f"{type(error).__name__}: {error}"
        if trouble:
            failed += 1
            print(f"{address} FAILED: {trouble}")
    print(f"{len(addresses) - failed} of {len(addresses)} replicas delivered the test alert")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
