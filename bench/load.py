"""A load generator light enough to saturate an asyncio server from one core.

Falco-like senders: each has one request in flight on a kept-alive connection, or opens a connection for every alert
as Falco did up to 0.35. Every alert is different, so that none is taken for a duplicate. One thread, epoll, bytes.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from itertools import count
from typing import NamedTuple

MARK = b"0000000000000000000"
ANSWER_END = b"\r\n\r\n"


class Result(NamedTuple):
    """What a run did: answers with 200, and the seconds it took."""

    acknowledged: int
    refused: int
    secs: float
    latencies: list[float]

    @property
    def rate(self) -> float:
        return self.acknowledged / self.secs


class Alerts:
    """Requests with a body of about 1.2 KB; every one has a number of its own in ``output_fields``."""

    def __init__(self, start: int, *, keep_alive: bool = True) -> None:
        body = (
            b'{"hostname":"ip-10-0-12-34.eu-west-1.compute.internal","output":"22:58:03.161518126: Warning Sensitive '
            b"file opened for reading by non-trusted program | file=/etc/shadow gparent=bash ggparent=systemd "
            b"gggparent=<NA> evt_type=openat user=root user_uid=0 user_loginuid=-1 process=cat "
            b"proc_exepath=/usr/bin/cat parent=sh command=cat /etc/shadow terminal=34816 "
            b"container_id=3ad7b26ded6d container_name=payments-api "
            b"container_image_repository=111122223333.dkr.ecr.eu-west-1.amazonaws.com/shop/payments-api "
            b'container_image_tag=1.4.2 k8s_pod_name=payments-api-7c9f k8s_ns_name=shop","output_fields":{'
            b'"container.id":"3ad7b26ded6d","container.image.repository":'
            b'"111122223333.dkr.ecr.eu-west-1.amazonaws.com/shop/payments-api","container.image.tag":"1.4.2",'
            b'"container.name":"payments-api","evt.time":'
            + MARK
            + b',"evt.type":"openat","fd.name":"/etc/shadow",'
            b'"k8s.ns.name":"shop","k8s.pod.name":"payments-api-7c9f","proc.cmdline":"cat /etc/shadow",'
            b'"proc.exepath":"/usr/bin/cat","proc.name":"cat","proc.pname":"sh","proc.tty":34816,'
            b'"user.loginuid":-1,"user.name":"root","user.uid":0},"priority":"Warning",'
            b'"rule":"Read sensitive file untrusted","source":"syscall","tags":["T1555","container","filesystem",'
            b'"host","maturity_stable","mitre_credential_access"],"time":"2026-11-20T22:58:03.161518126Z"}'
        )
        connection = b"" if keep_alive else b"Connection: close\r\n"
        request = (
            b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: falcosecurity/falco\r\nAccept: */*\r\n"
            + connection
            + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        ) + body
        self.body_bytes = len(body)
        self._head, self._tail = request.split(MARK)
        self._numbers = count(1_700_000_000_000_000_000 + start)

    def next(self) -> bytes:
        return b"%b%d%b" % (self._head, next(self._numbers), self._tail)

    def next_body(self) -> bytes:
        return self.next().partition(ANSWER_END)[2]


def closed_loop(port: int, *, connections: int, secs: float, start: int, keep_alive: bool = True) -> Result:
    """Every sender posts its next alert as soon as the last one is answered."""
    alerts = Alerts(start, keep_alive=keep_alive)
    poll = select.epoll()
    sockets: dict[int, socket.socket] = {}

    def connect() -> None:
        sender = socket.create_connection(("127.0.0.1", port))
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets[sender.fileno()] = sender
        poll.register(sender.fileno(), select.EPOLLIN)
        sender.sendall(alerts.next())

    for _ in range(connections):
        connect()
    acknowledged = refused = 0
    started = time.perf_counter()
    end = started + secs
    now = started
    while now < end:
        for fd, _ in poll.poll(1):
            sender = sockets[fd]
            answer = sender.recv(4096)
            if answer:
                if answer.startswith(b"HTTP/1.1 200"):
                    acknowledged += 1
                else:
                    refused += 1
            if keep_alive and answer:
                sender.sendall(alerts.next())
            elif answer or not keep_alive:
                poll.unregister(fd)
                del sockets[fd]
                sender.close()
                connect()
        now = time.perf_counter()
    elapsed = now - started
    for fd, sender in sockets.items():
        poll.unregister(fd)
        sender.settimeout(5)
        if sender.recv(4096).startswith(b"HTTP/1.1 200"):  # the last answers count for delivery
            acknowledged += 1
        sender.close()
    return Result(acknowledged, refused, elapsed, [])


def paced(port: int, *, senders: int, rate: float, secs: float, start: int) -> Result:
    """``rate`` alerts a second over ``senders`` connections; latencies in seconds."""
    alerts = Alerts(start)
    poll = select.epoll()
    idle: deque[socket.socket] = deque()
    sent_at: dict[int, float] = {}
    sockets: dict[int, socket.socket] = {}
    for _ in range(senders):
        sender = socket.create_connection(("127.0.0.1", port))
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets[sender.fileno()] = sender
        poll.register(sender.fileno(), select.EPOLLIN)
        idle.append(sender)
    latencies: list[float] = []
    refused = 0
    started = time.perf_counter()
    due = started
    while due < started + secs or sent_at:
        now = time.perf_counter()
        if due <= now and due < started + secs and idle:
            sender = idle.popleft()
            sent_at[sender.fileno()] = max(due, now)
            sender.sendall(alerts.next())
            due += 1 / rate
            continue
        wait = max(0.0, min(due - now, 0.01)) if due < started + secs else 0.05
        for fd, _ in poll.poll(wait):
            sender = sockets[fd]
            answer = sender.recv(4096)
            latencies.append(time.perf_counter() - sent_at.pop(fd))
            refused += not answer.startswith(b"HTTP/1.1 200")
            idle.append(sender)
    for sender in sockets.values():
        sender.close()
    return Result(len(latencies) - refused, refused, time.perf_counter() - started, latencies)
