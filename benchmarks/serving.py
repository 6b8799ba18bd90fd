"""What serving costs: pictures a second over HTTP, against drawing the same batches.

    python benchmarks/serving.py --model=DIR                    # a workdir or a diffusers folder
    python benchmarks/serving.py --model=DIR --requests=1000    # and whether memory stays flat

Clients, as many as pictures of two batches, ask for one picture each by A1111's protocol until all
requests are answered. The peer is `sdjax.sampling.generate.draw`, as `sdjax.sample` uses it, with
batches of the same size, in turn with it in the same process. The resident memory of the process is
read after the first tenth of the requests and at the end.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from measure import environment, table, write_json

from sdjax import serve
from sdjax.families.conditioning import encode_text
from sdjax.sampling.generate import draw, latent_shape, make_generator
from sdjax.system.listening import listen
from sdjax.web.server.app import make_app
from sdjax.web.server.service import Service

PROMPT = "a red circle"


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """A context with the address of the server."""
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(make_app(service), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def resident() -> float:
    """MiB of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def over_http(address: str, count: int, clients: int) -> list[float]:
    """Seconds of each of so many requests."""
    client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=clients))

    def ask(seed: int) -> float:
        began = time.perf_counter()
        body = {"prompt": PROMPT, "seed": seed}
        answer = client.post(f"{address}/sdapi/v1/txt2img", json=body)
        assert answer.status_code == 200, answer.text
        assert len(json.loads(answer.text)["images"]) == 1
        return time.perf_counter() - began

    with client, concurrent.futures.ThreadPoolExecutor(clients) as threads:
        return list(threads.map(ask, range(count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--requests", type=int, default=64, help="of each block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args()
    options = (f"--model={args.model}", f"--steps={args.steps}", f"--batch_size={args.batch_size}")
    asked = serve.parser().parse_args([*options, "--rate=1000000", "--queue=1000"])
    service = serve._service(asked, serve._limits(asked))
    loaded = service.loaded
    height, width = loaded.model.native_size
    generate = make_generator(loaded.model, loaded.own)
    tokens = encode_text(loaded.model.tokenizers, [PROMPT] * args.requests)
    nothing = {field: rows[0] for field, rows in encode_text(loaded.model.tokenizers, [""]).items()}

    def batches(count: int) -> None:
        prompts = {field: rows[:count] for field, rows in tokens.items()}
        draw(
            generate, loaded.params, prompts, nothing,
            shape=latent_shape(loaded.model, height, width), seed=0, batch_size=args.batch_size,
        )  # fmt: skip

    clients = 2 * args.batch_size
    ratios, rates, latencies = [], [], []
    with listening(service) as address:
        batches(args.batch_size)
        over_http(address, max(args.requests // 10, clients), clients)
        before = resident()
        for _ in range(args.blocks):
            began = time.perf_counter()
            batches(args.requests)
            middle = time.perf_counter()
            latencies += over_http(address, args.requests, clients)
            ended = time.perf_counter()
            rates.append(args.requests / (ended - middle))
            ratios.append((middle - began) / (ended - middle))
        after = resident()
    found = {
        "pictures/s": statistics.median(rates),
        "of drawing the batches": statistics.median(ratios),
        "seconds a request, median": statistics.median(latencies),
        "95 %": float(np.percentile(latencies, 95)),
        "MiB before": before,
        "MiB after": after,
    }
    print(table(["measured", "value"], [[name, f"{value:.3g}"] for name, value in found.items()]))
    if args.json:
        write_json(args.json, {"environment": environment(), **found, "ratios": ratios})


if __name__ == "__main__":
    main()
