"""The dashboard and the alerts ask for metrics that there are, by labels that they have."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sdjax.train.exporting.numbers import METRICS, Numbers, families
from sdjax.train.monitoring.data_profile import distribution
from sdjax.web.server import metrics
from sdjax.web.server.statistics import Histogram

FOLDER = Path(__file__).parents[2] / "launch" / "monitoring"
OTHERS = {"up": {"job", "instance"}}  # Prometheus' own
ADDED = {"job", "instance"}  # labels that Prometheus adds to every sample


def alerts():
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels():
    return json.loads((FOLDER / "grafana.json").read_text())["panels"]


def expressions():
    found = [(rule["alert"], rule["expr"]) for rule in alerts()]
    for panel in panels():
        found += [(panel["title"], target["expr"]) for target in panel.get("targets", ())]
    return found


def samples_of(collected):
    """{sample: its labels} of what a collector yields, as it is written and read again."""

    class Registry:
        def collect(self):
            return collected

    found = {}
    for family in text_string_to_metric_families(generate_latest(Registry()).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def exported():
    """{sample: labels} of everything that a run and a server can export."""
    labels = ("run", "process", "config", "git", "sdjax", "family", "method")
    numbers = Numbers(dict.fromkeys(labels, "x"), first=True)
    numbers.counters.last_save, numbers.counters.last_saved = 1.0, 1
    numbers.gauges = dict.fromkeys(
        (name for name, (kind, _) in METRICS.items() if kind == "gauge"), 1.0
    )
    numbers.validation = {("validation", "raw"): 1.0}
    numbers.memory = {"0": (1.0, 2.0)}
    return samples_of(families(numbers)) | samples_of(served())


def served():
    """Return what a server collects that has drawn pictures, and drifted."""
    histogram, one = Histogram((1.0,)), SimpleNamespace
    return metrics._Numbers(
        one(
            engine=one(
                tally=one(drawn=1, failed=1, stopped=1, refused=1, batches=1, seconds=1.0),
                jobs=lambda: ([], []),
            ),
            loaded=one(name="shapes", model=one(tokenizers={})),
            digest="0123",
            statistics=one(
                latency=histogram,
                queued=histogram,
                measures={"brightness": histogram},
                profile={"brightness": distribution([0.5])},
                drift=lambda: [("brightness", 0.1)],
            ),
        )
    ).collect()


@pytest.mark.parametrize("title, expression", expressions())
def test_expression_names_metrics_and_labels_that_there_are(exported, title, expression):
    known = exported | OTHERS
    named = re.findall(r"\b(sdjax_\w+|up)\b(?:\{([^}]*)\})?", expression)
    assert named
    for name, selectors in named:
        assert name in known, f"{title}: {name}"
        used = set(re.findall(r"(\w+)\s*[=!]~?", selectors))
        assert used <= known[name] | ADDED, f"{title}: {name}{{{selectors}}}"
    grouped = {word for words in re.findall(r"\bby \(([^)]*)\)", expression) for word in
               re.split(r"[ ,]+", words)}  # fmt: skip
    everywhere = set.intersection(*(known[name] for name, _ in named))
    assert grouped <= everywhere | ADDED, title
    assert expression.count("(") == expression.count(")")


def test_every_metric_of_a_run_is_exported(exported):
    for name, (kind, _) in METRICS.items():
        ending = {"histogram": "_bucket", "summary": "_sum"}.get(kind, "")
        assert name + ending in exported


def test_alerts_have_what_prometheus_wants():
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names) >= 10
    for rule in alerts():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        shown = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
        assert shown or "quantile" in rule["expr"]


def test_panels_have_places_of_their_own():
    taken = {}
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_prometheus_reads_the_rules_and_the_usual_ports():
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yaml"]
    jobs = {
        job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]
    }
    assert set(jobs) == {"sdjax", "sdjax_serve"} and jobs["sdjax_serve"] == ["localhost:7860"]
