"""Images per second that reach the training loop, beside torch's DataLoader and tf.data.

    python benchmarks/input_pipeline.py [--resolutions=256,512,1024] [--repeats=5] [--json=FILE]
    python benchmarks/input_pipeline.py --data=DIR     # an image folder with metadata.jsonl
    python benchmarks/input_pipeline.py --memory       # of the process, over 20,000 batches

It makes photo-like JPEGs (docs/benchmarks_input.md says which), stores them in every form that
sdjax reads, checks that all loaders make the same batches of them, and then times all of them in
turn, again and again. Rates are images per second, and images per second of processor time, which
other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PREFETCH = 2  # batches, in all loaders
BATCH = {64: 4, 256: 16, 512: 8, 1024: 4}
COUNT = {64: 1024, 256: 1024, 512: 256, 1024: 64}  # photographs
TF_MEAN, TF_MAX = 0.5 / 127.5, 8 / 127.5  # TensorFlow resizes in float32, Pillow rounds half-way
RAW, PEERS = "image folder", ("torch DataLoader", "tf.data")


@dataclasses.dataclass(frozen=True)
class Contender:
    """start(threads, shuffle) -> endless batches; 0 threads make each when it is asked for."""

    name: str
    start: Callable[[int, bool], Iterator[np.ndarray]]
    batches: int  # of one timing
    in_parallel: bool = True


def sdjax_batches(config: Any) -> Callable[[int, bool], Iterator[np.ndarray]]:
    """Batches of the pictures or moments alone, as the peers give them."""
    from sdjax.data.pipeline import make_iterator

    def start(threads: int, shuffle: bool) -> Iterator[np.ndarray]:
        ahead = PREFETCH if threads else 0
        how = dataclasses.replace(config, prefetch=ahead, threads=max(threads, 1))
        for batch in make_iterator(how, {}, split="train", seed=0, shuffle=shuffle):
            yield batch["moments" if config.name == "encoded" else "image"]

    return start


def contenders(work: Path, photos: Path, resolution: int) -> list[Contender]:
    """Every form of the photographs through sdjax, and the peers on the files themselves."""
    import input_data
    import input_peers

    batch = BATCH.get(resolution, 8)
    batches = 8 if resolution < 1024 else 4
    forms = input_data.stored_forms(work, photos, resolution, batch)
    files = [str(path) for path, _ in input_data.read_folder(photos)]

    def with_torch(threads: int, shuffle: bool) -> Iterator[np.ndarray]:
        return input_peers.torch_batches(
            files, resolution, batch, workers=threads, prefetch=PREFETCH, shuffle=shuffle
        )

    def with_tf(threads: int, shuffle: bool) -> Iterator[np.ndarray]:
        return input_peers.tf_batches(
            files, resolution, batch, threads=threads, prefetch=PREFETCH, shuffle=shuffle
        )

    found = []
    for name, config in forms.items():
        count = 200 if name == "encoded" else batches
        start = sdjax_batches(config)
        found.append(Contender(name, start, count, in_parallel=name in (RAW, "encoded")))
    torch, tf = PEERS
    return [*found, Contender(torch, with_torch, batches), Contender(tf, with_tf, batches)]


def check(every: list[Contender], pictures: int) -> float:
    """That all make the same pictures of the same files; the mean difference of tf.data's.

    The pictures of sdjax are those of Pillow to the bit, in an order of their own.
    """
    torch, tf = ([c for c in every if c.name == name][0] for name in PEERS)
    one, other = (_first(c.start(0, False), 2) for c in (torch, tf))
    difference = np.abs(one - other)
    if difference.mean() > TF_MEAN or difference.max() > TF_MAX:
        raise SystemExit(f"tf.data differs by {difference.mean():.4f}, {difference.max():.4f}")
    whole = _first(torch.start(0, False), 2 * pictures // len(one))
    known = {picture.tobytes() for picture in whole}
    for contender in every:
        if contender.name not in (*PEERS, "encoded"):
            made = _first(contender.start(0, False), 1)
            if any(picture.tobytes() not in known for picture in made):
                raise SystemExit(f"{contender.name}: a picture that the peers do not make")
    return float(difference.mean())


def _first(batches: Iterator[np.ndarray], count: int) -> np.ndarray:
    return np.concatenate([next(batches) for _ in range(count)])


def workers() -> list[psutil.Process]:
    """The processes that this one has started."""
    return psutil.Process().children(recursive=True)


def processor_time(processes: list[psutil.Process]) -> float:
    """Seconds that this process and those have used."""
    others = sum(used.user + used.system for used in (p.cpu_times() for p in processes))
    return time.process_time() + others


def settle(processes: list[psutil.Process], *, quiet: float = 0.3, at_most: float = 10.0) -> None:
    """Waits until the loaders that were timed before have made what they make ahead."""
    begin = since = time.monotonic()
    used = processor_time(processes)
    while time.monotonic() < min(since + quiet, begin + at_most):
        time.sleep(0.05)
        now = processor_time(processes)
        if now - used > 0.02:
            since, used = time.monotonic(), now


def measure(batches: Iterator[np.ndarray], count: int, ahead: int) -> tuple[float, float]:
    """Images per second and per second of processor time, after what was made ahead is used up."""
    processes = workers()
    settle(processes)
    for _ in range(ahead + 1):
        next(batches)
    wall, cpu = time.monotonic(), processor_time(processes)
    images = sum(len(next(batches)) for _ in range(count))
    return images / (time.monotonic() - wall), images / (processor_time(processes) - cpu)


def compare(every: list[Contender], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """{"name, threads": rates of each round}. A round times each loader once, one after the other;
    the others wait, with what they have made ahead, which the next timing throws away."""
    runs: dict[str, tuple[Contender, int, Iterator[np.ndarray]]] = {}
    for contender in every:
        for threads in (0, CORES):
            if threads and not contender.in_parallel:
                continue
            batches = contender.start(threads, True)
            next(batches)  # starts threads and processes, fills caches
            runs[f"{contender.name}|{threads}"] = (contender, threads, batches)
    rates: dict[str, list[tuple[float, float]]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, (contender, threads, batches) in runs.items():
            rates[key].append(measure(batches, contender.batches, PREFETCH * threads))
    for _, _, batches in runs.values():
        if hasattr(batches, "close"):
            batches.close()
    return rates


def summarise(rates: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians, least and most."""
    wall, cpu = zip(*rates, strict=True)
    return {
        "images_per_s": statistics.median(wall),
        "images_per_cpu_s": statistics.median(cpu),
        "images_per_cpu_s_range": [min(cpu), max(cpu)],
        "rounds": rates,
    }


def ratio(
    rates: dict[str, list[tuple[float, float]]], one: list[str], other: list[str], which: int
) -> float:
    """Median over the rounds of the best of `one` by the best of `other` in the same round."""
    best = [[max(rates[k][i][which] for k in keys) for i in range(len(rates[keys[0]]))]
            for keys in (one, other)]  # fmt: skip
    return statistics.median(a / b for a, b in zip(*best, strict=True))


def report(resolution: int, rates: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Prints the table of one resolution."""
    print(f"\n{resolution} px        loader          threads   images/s   per core   "
          "images/CPU s (least to most)")  # fmt: skip
    found: dict[str, Any] = {}
    for key, values in rates.items():
        name, threads = key.split("|")
        row = found[key] = summarise(values)
        low, high = row["images_per_cpu_s_range"]
        print(f"{name:>28} {threads:>10} {row['images_per_s']:10.1f} "
              f"{row['images_per_s'] / max(int(threads), 1):10.1f} "
              f"{row['images_per_cpu_s']:10.1f} ({low:.1f} to {high:.1f})")  # fmt: skip
    for label, threads in (("one thread", 0), (f"{CORES} threads", CORES)):
        raw = [f"{RAW}|{threads}"]
        peers = [f"{name}|{threads}" for name in PEERS]
        pair = (f"{label}: raw by the better peer", raw, peers), (
            f"{label}: encoded by raw", [f"encoded|{threads}"], raw)  # fmt: skip
        for what, one, other in pair:
            found[what] = {"wall": ratio(rates, one, other, 0), "cpu": ratio(rates, one, other, 1)}
            print(f"  {what}: {found[what]['cpu']:.2f} in processor time, "
                  f"{found[what]['wall']:.2f} in elapsed time")  # fmt: skip
    return found


def memory(work: Path, photos: Path, resolution: int, batches: int) -> dict[str, list[float]]:
    """MiB that this process holds as batches go by, for pictures and for moments."""
    import input_data

    points = sorted({*np.linspace(0, batches, 11).astype(int)[1:], min(200, batches)})
    forms = input_data.stored_forms(work, photos, resolution, BATCH.get(resolution, 8))
    found: dict[str, list[float]] = {}
    for name in (RAW, "encoded"):
        stream = sdjax_batches(forms[name])(CORES, True)
        found[name], done = [], 0
        for point in points:
            for _ in range(point - done):
                next(stream)
            done = point
            found[name].append(psutil.Process().memory_info().rss / 2**20)
            print(f"{name}, {resolution} px, after {done} batches: {found[name][-1]:.1f} MiB",
                  flush=True)  # fmt: skip
        stream.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolutions", default="256,512,1024")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=Path, help="image folder to read in place of made pictures")
    parser.add_argument(
        "--work", type=Path, help="keeps what is made here; else a temporary folder"
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--memory", action="store_true", help="memory over time, and no speed")
    parser.add_argument("--batches", type=int, default=20_000, help="with --memory")
    args = parser.parse_args()
    import input_data
    import torch

    torch.set_num_threads(1)  # in this process; what the loader's workers have too
    packages = ("sdjax", "grain", "pillow", "torch", "tensorflow-cpu", "numpy")
    results: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {CORES} cores",
        "load": os.getloadavg(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    with tempfile.TemporaryDirectory() as temporary:
        for resolution in map(int, args.resolutions.split(",")):
            work = (args.work or Path(temporary)) / str(resolution)
            work.mkdir(parents=True, exist_ok=True)
            photos = args.data or work / "photos"
            if not photos.exists():
                input_data.make_photos(photos, resolution, COUNT.get(resolution, 64))
            if args.memory:
                results[str(resolution)] = memory(work, photos, resolution, args.batches)
            else:
                every = contenders(work, photos, resolution)
                apart = 127.5 * check(every, len(input_data.read_folder(photos)))
                print(f"{resolution} px: sdjax gives Pillow's pixels to the bit, tf.data is off by "
                      f"{apart:.2f} of 255 in the mean")  # fmt: skip
                results[str(resolution)] = report(resolution, compare(every, args.repeats))
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
