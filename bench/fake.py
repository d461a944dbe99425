"""AWS for benchmarks: takes what it is sent as cheaply as Python can, and counts it.

Not strict (the strict fake is in tests/fakes): here only the forwarder's cost matters. ``GET /counts`` tells how many
events and findings came in.
"""

from __future__ import annotations

import asyncio
import json
import sys
from email.utils import formatdate

IDENTITY = (
    b'<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>'
    b"<Arn>arn:aws:iam::111122223333:user/bench</Arn><UserId>AIDA</UserId><Account>111122223333</Account>"
    b"</GetCallerIdentityResult><ResponseMetadata><RequestId>1</RequestId></ResponseMetadata></GetCallerIdentityResponse>"
)
counts = {"events": 0, "findings": 0, "calls": 0, "batches": 0}


class Service(asyncio.Protocol):
    """One connection: header, Content-Length body, answer."""

    def __init__(self) -> None:
        self._head = b""
        self._parts: list[bytes] = []
        self._missing = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._missing:
            head, end, rest = (self._head + data).partition(b"\r\n\r\n")
            if not end:
                self._head = head
                return
            self._head = head
            lower = head.lower()
            at = lower.find(b"content-length:")
            length = (
                int(lower[at + 15 : lower.find(b"\r\n", at) if lower.find(b"\r\n", at) > 0 else None])
                if at > 0
                else 0
            )
            self._parts = [rest]
            self._missing = length - len(rest)
        else:
            self._parts.append(data)
            self._missing -= len(data)
        if self._missing <= 0:
            self._missing = 0
            self._answer(self._head, b"".join(self._parts))
            self._head, self._parts = b"", []

    def _answer(self, head: bytes, body: bytes) -> None:
        counts["calls"] += 1
        answer, kind = b"{}", b"application/x-amz-json-1.1"
        if b"PutLogEvents" in head:
            counts["events"] += body.count(b'{"timestamp":')
            counts["batches"] += 1
        elif head.startswith(b"POST /findings/import"):
            number = body.count(b'"SchemaVersion"')
            counts["findings"] += number
            answer = b'{"FailedCount":0,"SuccessCount":%d,"FailedFindings":[]}' % number
            kind = b"application/json"
        elif head.startswith(b"GET /counts"):
            answer = json.dumps(counts).encode()
        elif b"GetCallerIdentity" in body:
            answer, kind = IDENTITY, b"text/xml"
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nDate: %b\r\nContent-Length: %d\r\n\r\n%b"
            % (kind, formatdate(usegmt=True).encode(), len(answer), answer)
        )


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Service, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
