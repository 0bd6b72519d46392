"""A real S3 server for tests, on a free port; nothing of it outlives the test."""

from __future__ import annotations

import contextlib
import os

import pytest

from tests.servers import free_port

SECRET = "the-secret-of-the-bucket"
VARIABLES = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server():
    """A boto3 client of the server, with its ``url`` and ``secret``; the environment leads to it meanwhile."""
    server = pytest.importorskip("moto.server", reason="moto is not installed (requirements-dev.txt)")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (requirements-s3.txt)")
    import boto3

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**VARIABLES, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        client.url, client.secret = os.environ["AWS_ENDPOINT_URL"], SECRET
        try:
            yield client
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            running.stop()
