"""A workdir as a run leaves it, made up, for the tests of the report."""

import json

import numpy as np
from PIL import Image

from sdjax.sampling.grids import save_png

NASTY = "<script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>&\"</pre>"
GROUPS = ("unet.conv_in", "unet.down_blocks.0", "unet.mid_block", "unet.up_blocks.0",
          "text_encoder.encoder")  # fmt: skip
SHARES = {
    "counts": [30, 10], "untold": 2, "shares": [0.75, 0.25], "low": [0.6, 0.14],
    "high": [0.86, 0.4], "difference": {"value": 0.5, "low": 0.3, "high": 0.7},
    "ratio": {"value": 0.33, "low": None, "high": None},
    "distance": {"value": 0.25, "low": 0.1, "high": 0.4},
}  # fmt: skip
AUDIT = {"labels": ["dark", NASTY], "texts": [], "target": [0.5, 0.5], "all": SHARES,
         "prompts": {"a doctor": SHARES}}  # fmt: skip
SETS = ("raw", "warmup-0.9999")


def make_lines(count, *, every=10, seed=0):
    """Lines of metrics.jsonl: a run that overfits in its second half, with a spike and a skip."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(1, count + 1):
        step, part = i * every, i / count
        loss = 0.1 + np.exp(-5 * part) + 0.02 * rng.standard_normal()
        row = {
            "step": step,
            "train/loss": loss,
            "train/loss_unweighted": loss,
            "train/grad_norm": 0.5 + 0.05 * rng.standard_normal() + (20 if i == count // 2 else 0),
            "train/update_norm": 0.01,
            "train/spikes": int(i == count // 2),
            "train/skipped_steps": int(part > 0.7),
            "train/data_wait": 0.1,
            "train/learning_rate": 1e-4 * min(1, 10 * part),
            "train/epoch": step * 32 / 5000,
            "train/images_seen": step * 32,
            "train/images_per_second": 500 + 5 * rng.standard_normal(),
            "train/mfu": 0.41,
            "train/truncated_captions": int(step * 32 * 0.05),
            "device/memory_gib": 30.0,
            "device/memory_peak_gib": 38.5,
            "device/memory_limit_gib": 40.0,
        }
        for group in GROUPS:
            row[f"train/grad_norms/{group}"] = 0.1 + rng.random()
            row[f"train/param_norms/{group}"] = 10 + part
            row[f"train/update_ratios/{group}"] = 1e-3 * (1 + rng.random())
        for t in range(4):
            row[f"train/loss_at/t{250 * t:04d}-{250 * t + 249:04d}"] = loss * (4 - t)
        if i % max(1, count // 10) == 0:
            for name in SETS:
                row[f"validation/{name}/loss"] = 0.3 + (part - 0.5) ** 2
                row[f"validation_train/{name}/loss"] = 0.3 - 0.1 * part
                row[f"validation/{name}/loss_at/t0937"] = 0.1 + part
        rows.append(row)
    return rows


def lines(*rows):
    """metrics.jsonl as bytes."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_pictures(folder, steps, kinds=("", "-raw-unguided"), side=240, seed=0):
    """Grids with their prompts, one of which is nasty."""
    rng = np.random.default_rng(seed)
    for step in steps:
        for kind in kinds:
            image = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            image = np.asarray(
                Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
            )
            prompts = f"a large red circle\n{NASTY}"
            save_png(folder / f"{step:08d}{kind}.png", image, {"step": step, "prompts": prompts})


def write_evaluation(folder, step, *, weights="warmup-0.9999", warnings=(), pictures=True):
    """evaluations/NAME as sdjax.evaluate writes it."""
    part = step / 2000
    content = {
        "model": "runs/x", "step": step, "weights": weights, "dataset": "captioned_shapes",
        "split": "test", "num_samples": 512, "seed": 0, "sampler": {"name": "ddim", "steps": 25},
        "settings": {"guidance": 3.0, "note": NASTY, "towers": {}, "features": ""},
        "best_ema_length": {"length": 0.1, "metric": "fid", "value": 26.0, "command": "x"},
        "metrics": {
            "fid": {"value": 40 - 20 * part, "low": 38 - 20 * part, "high": 43 - 20 * part,
                    "higher_is_better": False},
            "clip_score": {"value": 20 + 5 * part, "low": None, "high": None,
                           "higher_is_better": True},
            f"share {NASTY}": {"value": 0.5, "low": 0.4, "high": 0.6},
        },
        "curves": {"ema_lengths/fid": {"x": [0.02, 0.1, 0.2], "y": [30.0, None, 26.0],
                                       "low": [29.0, 27.0, 25.0], "high": [31.0, 29.0, 27.0],
                                       "x_label": "width", "y_label": "fid", "log_x": True},
                   "words": {"x": ["a", "b"], "y": [1.0, 2.0]}},
        "warnings": list(warnings),
        "audit": {"attributes": {NASTY: AUDIT}},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(content))
    if pictures:
        image = np.zeros((64, 96, 3), np.uint8)
        for name in ("grid.png", "loss.png", "00007.png"):
            save_png(folder / name, image)


def write_data_report(folder):
    """report.json of sdjax.prepare, and report.html beside it."""
    folder.mkdir(parents=True)
    found = {
        "read": 1000, "usable": 950, "kept": 940, "splits": {"train": 900, "test": 40},
        "dropped": {"corrupt": 50, NASTY: 10},
        "steps": {
            "decoding": {"dropped": {"corrupt": 50}, "changed": {"first_frame": 3}},
            "duplicates": {"dropped": {NASTY: 10}, "changed": {}},
            "size": {"dropped": {}, "changed": {}},
        },
        "histograms": {"short side": [[0, 0], [64, 900], [128, 40]]},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(found))
    (folder / "report.html").write_text("<p>whole report")


def make_workdir(folder, *, count=400):
    """All that a report can show."""
    from sdjax.config import default, resolve, to_dict

    folder.mkdir(parents=True, exist_ok=True)
    config = default()
    config.data.update(name="prepared", path=str(folder.parent / "data"), batch_size=32)
    config.data.label_template = "{} " + NASTY
    config.train.steps = 2 * 10 * count
    config.validation.patience = 3
    text = json.dumps(to_dict(resolve(config)), indent=2)
    (folder / "config.json").write_text(text)
    rows = make_lines(count)
    rows[5]["train/loss"] = "NaN"
    rows[0]["data/not_used_NASTY" + NASTY] = 12.0
    (folder / "metrics.jsonl").write_bytes(lines(*rows))
    write_pictures(folder / "samples", (0, 1000, 2000))
    save_png(folder / "samples" / "strip.png", np.zeros((60, 900, 3), np.uint8))
    for step in (1000, 2000):
        write_evaluation(folder / "evaluations" / f"step-{step}", step, warnings=[NASTY])
    write_data_report(folder.parent / "data")
    return folder
