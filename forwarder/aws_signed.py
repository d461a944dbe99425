"""A signed request to an AWS API without the SDK's client for it.

For the two questions that are asked once, at most (EC2 DescribeTags, EKS ListClusters and DescribeCluster): the SDK's EC2 client alone
takes 21 MB and stops the event loop for 115 ms while it loads. Credentials and signature are the SDK's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlencode

import aiohttp
from botocore.awsrequest import AWSRequest

from forwarder.aws import Aws
from forwarder.contract import DeliveryError

REQUEST_SECS_MAX = 10.0
ANSWER_BYTES_MAX = 1 << 20
_SUFFIXES = {"aws-cn": "amazonaws.com.cn", "aws-eusc": "amazonaws.eu"}
_ERRORS = 400


class SignedError(Exception):
    """No answer, or an error; the message is the service's own."""


def endpoint(service: str, region: str, partition: str, environment: Mapping[str, str]) -> str:
    """The SDK's environment names first, then the service's regional endpoint."""
    given = environment.get(f"AWS_ENDPOINT_URL_{service.upper()}", "") or environment.get(
        "AWS_ENDPOINT_URL", ""
    )
    return given.rstrip("/") or f"https://{service}.{region}.{_SUFFIXES.get(partition, 'amazonaws.com')}"


async def signed(
    aws: Aws, service: str, path: str, form: Mapping[str, str] | None = None, *, region: str = ""
) -> bytes:
    """The body of a good answer to GET, or to POST of ``form``; in our own region unless told. Raises ``SignedError``."""
    region = region or aws.region
    method, data = ("POST", urlencode(form).encode()) if form else ("GET", b"")
    request = AWSRequest(
        method=method,
        url=endpoint(service, region, aws.partition(), os.environ) + path,
        data=data,
        headers={"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"} if form else {},
    )
    try:
        await aws.sign(service, region, request)
        async with (
            aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=REQUEST_SECS_MAX), trust_env=True
            ) as client,
            client.request(
                method,
                str(request.url),
                data=data or None,
                headers=dict(request.headers.items()),
                allow_redirects=False,
            ) as answer,
        ):
            body = bytearray()
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > ANSWER_BYTES_MAX:
                    raise SignedError(f"answer of more than {ANSWER_BYTES_MAX} bytes")
            text = bytes(body)
            if answer.status >= _ERRORS:
                raise SignedError(f"{answer.status}: {text[:300].decode('utf-8', 'replace')}")
            return text
    except DeliveryError as error:
        raise SignedError(str(error)) from error
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise SignedError(f"{type(error).__name__}: {error}") from error
