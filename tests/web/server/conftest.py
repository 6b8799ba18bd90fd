"""A server of the tiny pipeline, in this process."""

import contextlib
import socket
import threading
import time

import pytest
import uvicorn
from starlette.testclient import TestClient

from sdjax import serve
from sdjax.web.server.app import make_app

STEPS = 4


@pytest.fixture(scope="session")
def service(pipeline_folder):
    """The tiny pipeline, drawn in 4 steps with guidance 3, two at once."""
    options = (f"--model={pipeline_folder}", f"--steps={STEPS}", "--guidance=3", "--batch_size=2")
    args = serve.parser().parse_args(
        [*options, "--max_side=64", "--max_pictures=4", "--rate=1000000"]
    )
    return serve._service(args, serve._limits(args))


@pytest.fixture
def client(service):
    """A client of the application, without a network."""
    return TestClient(make_app(service, hosts=("testserver",)), raise_server_exceptions=False)


@contextlib.contextmanager
def listening(app):
    """A real server of an application; its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def address(service):
    with listening(make_app(service)) as url:
        yield url
