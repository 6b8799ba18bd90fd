"""The `monitor` group of the configuration."""

from __future__ import annotations

import dataclasses

TRACKERS = ("wandb", "mlflow", "trackio")  # names of sdjax/train/trackers/registry.py


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """Where else the numbers of a run go, beside `metrics.jsonl` and TensorBoard."""

    # Of "wandb", "mlflow" and "trackio", each with the extra of its name: pip install
    # 'sdjax[wandb]'. Servers and keys are those of their own environment variables.
    trackers: tuple[str, ...] = ()
    project: str = "sdjax"  # the project of W&B and trackio, the experiment of MLflow
    name: str = ""  # of the run there; "" is the name of the workdir
    # Every process answers Prometheus at http://HOST:PORT/metrics, at the next free of 16 ports if
    # this one is taken; 0: none does.
    prometheus_port: int = 0
    prometheus_host: str = "127.0.0.1"  # who may ask: this machine; "0.0.0.0": whoever reaches it
    textfile: str = ""  # folder of node_exporter's textfile collector, for short runs; "": none

    def __post_init__(self):
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(
                    f"monitor.trackers has {name!r}; expected some of {', '.join(TRACKERS)}"
                )
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"monitor.trackers is {self.trackers!r}; expected each name once")
        if self.trackers and not self.project.strip():
            raise ValueError("monitor.project is empty; expected the name of a project")
        if not 0 <= self.prometheus_port < 65536:
            raise ValueError(
                f"monitor.prometheus_port is {self.prometheus_port}; expected 0 (none) to 65535"
            )
        if self.prometheus_port and not self.prometheus_host:
            raise ValueError(
                "monitor.prometheus_host is empty; expected an address of this machine, or 0.0.0.0 "
                "for all of them"
            )
