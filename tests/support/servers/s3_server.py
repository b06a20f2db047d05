"""A server that speaks S3, in this process, and its own client, which is apart from the kit."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "bucket"
MARKER = "mixtral_run_complete.json"
SECRET = "aSecretThatMustBeInNoFile"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Run a server that begins empty. Yield its address and keys as environment variables."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    # All servers of a process share what they hold.
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")).close()
    keys = {"AWS_ACCESS_KEY_ID": "AKIDOFTESTS", "AWS_SECRET_ACCESS_KEY": SECRET}
    try:
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **keys}
    finally:
        server.stop()


def stored(client: Any) -> dict[str, int]:
    """Return the sizes of all objects by their names."""
    found = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return {each["Key"]: each["Size"] for each in found}


def content(client: Any, name: str) -> bytes:
    """Return the content of an object."""
    body: bytes = client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
    return body
