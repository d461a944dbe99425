"""The log: one JSON line per event whatever is in it, and no secret ever."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from forwarder.logs import REDACTED, VALUE_LENGTH_MAX, configure

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """The process's logging is as before after each test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def stream() -> io.StringIO:
    found = io.StringIO()
    configure("info", found)
    return found


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """What was written: every line is one JSON object."""
    text = stream.getvalue()
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


def line(stream: io.StringIO) -> dict[str, Any]:
    (only,) = lines(stream)
    return only


# ---- one line per event -----------------------------------------------------------------------------


def test_an_event_is_one_json_line(stream: io.StringIO) -> None:
    structlog.get_logger("delivery").warning("call failed", sink="x", count=3, none=None)
    found = line(stream)
    assert found.pop("timestamp").endswith("Z")
    assert found == {
        "event": "call failed",
        "level": "warning",
        "logger": "delivery",
        "sink": "x",
        "count": 3,
        "none": None,
    }


def test_libraries_write_the_same_way(stream: io.StringIO) -> None:
    logging.getLogger("some.library").warning("it is %s", "so")
    found = line(stream)
    assert (found["event"], found["level"], found["logger"]) == ("it is so", "warning", "some.library")
    assert "timestamp" in found


@pytest.mark.parametrize("text", ["a\nb", "a\r\n{}", "\u2028x\u2029", "\x1b[2J\x00", '"} {"', "\U0001f600"])
def test_values_never_break_the_line(stream: io.StringIO, text: str) -> None:
    """A log that is injected into is no witness."""
    structlog.get_logger("x").info(text, value=text)
    logging.getLogger("y").warning("%s", text)
    written = stream.getvalue()
    assert written.count("\n") == 2
    first, second = (json.loads(part) for part in written.split("\n")[:2])
    assert first["event"] == first["value"] == second["event"] == text


def test_text_that_is_no_unicode_is_logged_all_the_same(stream: io.StringIO) -> None:
    """Undecodable bytes of headers and file names come as half surrogate pairs."""
    # pytest's own handlers are off: it cannot send such text from a worker process.
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if getattr(handler, "stream", None) is stream]
    structlog.get_logger("x").info("bad header", value="name\udcff")
    logging.getLogger("y").warning("cannot open %s", "file\udc80")
    assert [entry["event"].split()[0] for entry in lines(stream)] == ["bad", "cannot"]


@pytest.mark.parametrize(
    "value", [Path("/x"), {1, 2}, b"\xff", 2**70, float("nan"), ValueError("x"), object, [Path("/x")]]
)
def test_any_value_can_be_logged(stream: io.StringIO, value: Any) -> None:
    structlog.get_logger("x").info("event", value=value)
    assert "value" in line(stream)


def test_an_exception_is_within_the_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        structlog.get_logger("x").exception("failed")
        logging.getLogger("y").exception("failed too")
    for found in lines(stream):
        assert found["level"] == "error"
        assert "Traceback" in found["exception"]
        assert "ValueError: two\nlines" in found["exception"]


def test_endless_values_are_cut(stream: io.StringIO) -> None:
    structlog.get_logger("x").info("event", value="x" * 10 * VALUE_LENGTH_MAX)
    assert len(line(stream)["value"]) == VALUE_LENGTH_MAX


# ---- levels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "count"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_nothing_below_the_level_is_written(level: str, count: int) -> None:
    found = io.StringIO()
    configure(level, found)
    log = structlog.get_logger("x")
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)("event")
    assert len(lines(found)) == count


@pytest.mark.parametrize("library", ["botocore", "aiobotocore", "aiohttp", "asyncio"])
def test_libraries_only_warn(library: str) -> None:
    found = io.StringIO()
    configure("debug", found)
    logging.getLogger(f"{library}.part").info("chatter")
    logging.getLogger(f"{library}.part").warning("trouble")
    assert line(found)["event"] == "trouble"


def test_stderr_is_the_default_and_configuring_twice_doubles_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure("info")
    configure("info")
    structlog.get_logger("x").info("event")
    assert capsys.readouterr().err.count("event") == 2  # the key and the value of one line
    assert capsys.readouterr().out == ""


# ---- secrets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["aws_secret_access_key", "SessionToken", "password", "Authorization", "credentials", "passwd"]
)
def test_values_of_secret_keys_are_redacted(stream: io.StringIO, key: str) -> None:
    structlog.get_logger("x").info("event", **{key: SECRET})
    assert line(stream)[key] == REDACTED


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("key AKIAIOSFODNN7EXAMPLE is unknown", "AKIAIOSFODNN7EXAMPLE"),
        ("ASIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE"),
        (f"http://user:{SECRET}@proxy:3128/ cannot be reached", SECRET),
        (f"https://{SECRET}@host/x", SECRET),
        (f"https://user:p@{SECRET}@host/x", SECRET),
        (f"GET /?X-Amz-Security-Token={SECRET}%2F&x=1", SECRET),
        (f"GET /?X-Amz-Signature={SECRET}", SECRET),
        (f"Authorization: AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/x, Signature={SECRET}", SECRET),
        (f"Authorization: Bearer {SECRET}", SECRET),
        (f'{{"SecretAccessKey": "{SECRET}"}}', SECRET),
    ],
)
def test_secrets_within_text_are_redacted(stream: io.StringIO, text: str, secret: str) -> None:
    log = structlog.get_logger("x")
    log.info("event", value=text)
    log.info(text)
    logging.getLogger("y").warning("%s", text)
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("failed")
    assert len(lines(stream)) == 4
    assert secret not in stream.getvalue()
    assert REDACTED in stream.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "NoCredentialsError: Unable to locate credentials",
        "CredentialRetrievalError: Error when retrieving credentials",
        "ExpiredTokenException: The security token included in the request is expired",
        "InvalidClientTokenId: The security token included in the request is invalid.",
        "InvalidIdentityToken: No OpenIDConnect provider found in your account",
        "InvalidSignatureException: Signature expired",
        "SignatureDoesNotMatch: The request signature we calculated does not match",
        "IncompleteSignature: the request is not signed as AWS wants it",
    ],
)
def test_what_aws_says_of_secrets_is_no_secret(stream: io.StringIO, text: str) -> None:
    """Without its first word a sentence may say the opposite."""
    structlog.get_logger("x").info("call failed", error=text)
    assert json.loads(stream.getvalue())["error"] == text


@pytest.mark.parametrize(
    "value",
    [
        {"password": SECRET},
        [f"http://user:{SECRET}@proxy"],
        {"deep": [{"session_token": SECRET}]},
        ValueError(f"http://user:{SECRET}@proxy"),
        (f"http://user:{SECRET}@proxy",),
    ],
    ids=repr,
)
def test_secrets_further_down_are_redacted(stream: io.StringIO, value: Any) -> None:
    structlog.get_logger("x").info("event", value=value)
    assert "event" in line(stream)
    assert SECRET not in stream.getvalue()


def test_what_is_no_secret_stays(stream: io.StringIO) -> None:
    texts = ["http://host:80/a@b", "mail@example.org", "AKIDO", "/signature/x", "https://host/?q=a@b"]
    structlog.get_logger("x").info("event", values=texts, text=" ".join(texts))
    found = line(stream)
    assert found["values"] == texts
    assert found["text"] == " ".join(texts)
