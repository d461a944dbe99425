"""Asks the other replicas which nodes they heard: ``GET /sensors`` at every address of every peer, all at once.

Nobody is trusted with our time or memory: an answer has ``ANSWER_SECS_MAX`` and ``ANSWER_BYTES_MAX``, redirects and compression are
refused. Our own address among them is harmless: we hear what we know. What is missing is named, and it is for the watch to judge.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import aiohttp
import msgspec

from forwarder.sensors import PEERS_MAX
from forwarder.sensors_watch import Answers

ANSWER_SECS_MAX = 2.0
ANSWER_BYTES_MAX = 4 << 20
"""Ten thousand nodes."""
NODES_MAX = 20_000


class _Answer(msgspec.Struct, frozen=True):
    nodes: dict[str, float]


_answer = msgspec.json.Decoder(_Answer)


class _NoAnswerError(Exception):
    """One line: who, and why."""


class Peers:
    """The other replicas."""

    def __init__(self, peers: Sequence[str]) -> None:
        self._peers = [_parts(peer) for peer in peers]

    async def ask(self) -> Answers:
        """What all of them heard; never raises for what a peer does."""
        found = await asyncio.gather(*(_addresses(host, port) for host, port in self._peers))
        urls = sorted({url for urls, _ in found for url in urls})
        troubles = [trouble for _, trouble in found if trouble]
        if len(urls) > PEERS_MAX:
            troubles.append(f"{len(urls)} addresses, and no more than {PEERS_MAX} are asked")
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECS_MAX)
        connector = aiohttp.TCPConnector(force_close=True, limit=PEERS_MAX)
        async with aiohttp.ClientSession(
            timeout=timeout,
            connector=connector,
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
        ) as session:
            answers = await asyncio.gather(
                *(_one(session, url) for url in urls[:PEERS_MAX]), return_exceptions=True
            )
        heard: dict[str, float] = {}
        for answer in answers:
            if isinstance(answer, _NoAnswerError):
                troubles.append(str(answer))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                for node, at in answer.items():
                    heard[node] = max(at, heard.get(node, at))
        return Answers(heard, "; ".join(troubles))


async def _addresses(host: str, port: int) -> tuple[list[str], str]:
    """URLs of all addresses a name has now, or why there are none."""
    try:
        async with asyncio.timeout(ANSWER_SECS_MAX):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return [], f"{host}: {getattr(error, 'strerror', None) or 'its name was not resolved'}"
    addresses = {str(address[0]).partition("%")[0] for *_, address in found}
    return [
        f"http://[{item}]:{port}/sensors" if ":" in item else f"http://{item}:{port}/sensors"
        for item in addresses
    ], ""


async def _one(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    try:
        async with session.get(url, allow_redirects=False) as response:
            if response.status != 200:  # noqa: PLR2004
                raise _NoAnswerError(f"{url}: HTTP {response.status}")
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > ANSWER_BYTES_MAX:
                    raise _NoAnswerError(f"{url}: an answer of more than {ANSWER_BYTES_MAX} bytes")
        nodes = _answer.decode(body).nodes
    except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError
        raise _NoAnswerError(f"{url}: {str(error) or type(error).__name__}") from error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _NoAnswerError(f"{url}: not the answer of a forwarder") from error
    if len(nodes) > NODES_MAX:
        raise _NoAnswerError(f"{url}: {len(nodes)} nodes")
    return nodes


def _parts(peer: str) -> tuple[str, int]:
    host, _, port = peer.rpartition(":")
    return host.strip("[]"), int(port)
