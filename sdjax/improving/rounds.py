"""A round of improvement, in stages: each writes a file, and is passed over where it is there.

settings.json   what the round was begun with
before/         find.jsonl, judge.jsonl: verdicts about the held-out prompts, and pictures
proposal.md, collect.jsonl, proposal.json
more/ or weights.jsonl, material.json, recipe.py
run/            the workdir of the next run
after/          as before/, of the half that judges
improve.json, improve.html
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdjax.config import Config
from sdjax.data.config import DataConfig
from sdjax.data.pictures import open_split
from sdjax.errors import UserError
from sdjax.evaluation.loading import OWN, Loaded, load
from sdjax.evaluation.metrics.fidelity import PROPERTIES
from sdjax.evaluation.opening import open_session
from sdjax.evaluation.request import Request
from sdjax.improving import comparison, groups, judging, material, proposal, training
from sdjax.improving.comparison import Comparison
from sdjax.improving.groups import Group, GroupsOf
from sdjax.improving.judging import FIND, JUDGE
from sdjax.improving.proposal import Finding, Proposal, Verdict
from sdjax.system import paths, text_files, untrusted

SETTINGS, RESULT = "settings.json", "improve.json"
PROPOSAL, COLLECT, FINDINGS = "proposal.md", "collect.jsonl", "proposal.json"
BEFORE, AFTER = "before", "after"
Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `sdjax.improve`, which explains them."""

    workdir: str
    output: str = ""
    step: int | None = None
    split: str = ""
    group_by: str = "auto"
    judge: str = "auto"
    shows: str = "exact"
    clip: str = ""
    prompts: int = 256
    per_prompt: int = 1
    least: int = 8
    target: float | None = None
    how: str = "auto"
    more: str = ""
    most: int = 2000
    cap: float = 3.0
    steps: int = 0
    rate: float = 0.3
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, least in (("prompts", 4), ("per_prompt", 1), ("least", 1), ("most", 1),
                            ("steps", 0), ("seed", 0), ("batch_size", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"--{name}={getattr(self, name)}; expected {least} or more")
        if not self.cap >= 1 or not 0 < self.rate < float("inf"):
            raise UserError(f"--cap={self.cap} and --rate={self.rate}; expected 1 or more, and a "
                            "number above 0")  # fmt: skip
        if self.shows not in PROPERTIES:
            raise UserError(f"--shows={self.shows}; expected one of {', '.join(PROPERTIES)}")
        if self.target is not None and not 0 < self.target <= 1:
            raise UserError(f"--target={self.target}; expected a share above 0, at most 1")

    @property
    def folder(self) -> Path:
        """Where the round is."""
        return Path(paths.absolute(paths.to_path(self.output or f"{self.workdir}/improve")))


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """A round that is open.

    base: the run's configuration; step: the checkpoint that is judged and trained on.
    data: of the run, whose held-out `split` has the prompts.
    judge, grouping, of: see `judging.choose_judge` and `groups.choose`.
    prompts: {half: captions}.
    """

    options: Options
    base: Config
    step: int
    data: DataConfig
    split: str
    judge: str
    grouping: str
    of: GroupsOf
    prompts: Mapping[str, tuple[str, ...]]

    @property
    def folder(self) -> Path:
        """Where the round is."""
        return self.options.folder

    def stored(self, name: str) -> Path:
        """A file of the round."""
        return self.folder / name


def open_round(options: Options) -> Round:
    """Read the run and choose judge, groups and prompts.

    Raises:
        UserError: an option does not suit the run, or the folder was begun with other settings.
    """
    base = training.read_base(options.workdir)
    step = options.step or training.best_step(options.workdir)
    split = options.split or base.data.eval_split
    if split == base.data.split:
        raise UserError(
            f"the prompts are of the split {split!r}, which the run trains on; name another by "
            "--split"
        )
    captions = open_split(base.data, split, size=(1, 1)).captions
    judge = judging.choose_judge(options.judge, captions, options.clip)
    separator = base.data.captions.separator
    grouping, of = groups.choose(options.group_by, captions, separator)
    material.choose_how(options.how, base.data, options.more)  # what is wrong is an error now
    prompts = judging.halves(captions, options.prompts)
    found = Round(options, base, step, base.data, split, judge, grouping, of, prompts)
    _begin(found)
    return found


def _begin(one: Round) -> None:
    """Note the settings, or compare them with those noted."""
    options = dataclasses.asdict(one.options)
    del options["output"]
    wanted = {**options, "workdir": str(paths.absolute(one.options.workdir)), "step": one.step,
              "split": one.split, "judge": one.judge, "group_by": one.grouping}  # fmt: skip
    file = one.stored(SETTINGS)
    if not file.exists():
        paths.write_text(file, json.dumps(wanted, indent=2) + "\n")
        return
    noted = text_files.read_json(file)
    names = sorted({*wanted, *noted}) if isinstance(noted, dict) else []
    differ = [f"{name}: {noted.get(name)!r} there, {wanted.get(name)!r} here" for name in names
              if noted.get(name) != wanted.get(name)]  # fmt: skip
    if differ or not names:
        raise UserError(
            f"--output={one.folder} was begun with other settings:\n  " + "\n  ".join(differ)
            + "\nuse these, or another --output"
        )  # fmt: skip


def judged(one: Round, model: str, step: int | None, name: str, halves: tuple[str, ...]) -> None:
    """Judge a model on halves of the prompts, and keep the verdicts."""
    folder = one.stored(name)
    todo = [half for half in halves if not (folder / f"{half}.jsonl").exists()]
    if not todo:
        return
    options = one.options
    loaded = load(model, step=step)
    loaded = dataclasses.replace(loaded, data=one.data)
    request = Request(
        model=model, step=step, dataset=OWN, split=one.split, seed=options.seed,
        batch_size=options.batch_size, clip=options.clip,
        metrics=(judging.METRIC[one.judge],), resamples=0,
    )  # fmt: skip
    if one.judge == "loss":
        _by_loss(one, request, loaded, folder, name)
        return
    session = open_session(request, loaded, folder)
    judge = judging.PictureJudge(
        session, one.judge, dict(one.prompts), options.per_prompt, options.shows
    )
    for half in todo:
        file = paths.to_path(folder / f"{half}.jsonl")
        judging.remembered(file, functools.partial(judge, half, paths.to_path(folder)))


def _by_loss(one: Round, request: Request, loaded: Loaded, folder: Path, name: str) -> None:
    """Judge all held-out examples by their loss; what is too much is what it was before."""
    session = open_session(request, loaded, folder)
    assert session.example_losses is not None
    limit_file = one.stored(f"{BEFORE}/limit.json")
    limit = None if name == BEFORE else _limit(limit_file)
    params: Any = dict(loaded.found.params)
    examples = session.example_losses(params).examples
    verdicts, limit = judging.by_loss(examples, limit)
    paths.make_folder(paths.to_path(folder))
    if name == BEFORE:
        paths.write_text(limit_file, json.dumps(limit))
    for half in (FIND, JUDGE):
        own = [v for v in verdicts if judging.half_of(v.caption) == half]
        judging.remembered(paths.to_path(folder / f"{half}.jsonl"), functools.partial(list, own))


def _limit(file: paths.Path) -> float:
    """The loss beyond which an example fails, as it was before."""
    remedy = f"delete {file.parent}, which is then judged again"
    with untrusted.explained(file, "a limit of the loss", remedy=remedy):
        limit = text_files.read_json(file)
        if isinstance(limit, bool) or not isinstance(limit, int | float) or limit != limit:
            raise TypeError(f"it is {untrusted.brief(limit)}")
        return float(limit)


def verdicts_of(one: Round, name: str, half: str) -> list[Verdict]:
    """The verdicts that are there."""

    def missing() -> list[Verdict]:
        raise AssertionError(f"{name}/{half} has not been judged")

    return judging.remembered(paths.to_path(one.stored(name) / f"{half}.jsonl"), missing)


def proposed(one: Round) -> tuple[list[Finding], list[Proposal]]:
    """Find the groups that fail, and write what to collect."""
    options = one.options
    trained = material.trained_groups(one.data, one.of)
    findings = proposal.find(
        verdicts_of(one, BEFORE, FIND), one.of, trained, least=options.least,
        target=options.target,
    )  # fmt: skip
    proposals = proposal.propose(findings, most=options.most)
    title = f"{options.workdir}, step {one.step}"
    paths.write_text(one.stored(PROPOSAL), proposal.as_text(title, findings, proposals))
    paths.write_text(one.stored(COLLECT), proposal.as_lines(proposals))
    content = {"findings": [f.to_dict() for f in findings],
               "proposals": [p.to_dict() for p in proposals]}  # fmt: skip
    paths.write_text(one.stored(FINDINGS), json.dumps(content, indent=2) + "\n")
    return findings, proposals


def _said(file: paths.Path) -> str:
    """Return a sentence about what was built."""
    with untrusted.explained(file, "a note of what was built", remedy="delete it"):
        note = text_files.read_json(file)["note"]
        if not isinstance(note, str):
            raise TypeError(f"its note is {untrusted.brief(note)}")
    return note


def built(one: Round, proposals: list[Proposal], tell: Tell) -> str:
    """Make the data and the recipe of the next run; return what was done, in words."""
    options, file = one.options, one.stored("material.json")
    if file.exists() and one.stored(training.RECIPE).exists():
        return _said(file)
    how = material.choose_how(options.how, one.data, options.more)
    made = material.build(
        how, one.data, proposals, one.of, paths.to_path(one.folder), more=options.more,
        cap=options.cap,
    )  # fmt: skip
    steps = options.steps or max(1, one.base.train.steps // 5)
    config = training.next_config(
        one.base, made.data, workdir=options.workdir, step=one.step, steps=steps,
        rate=options.rate,
    )  # fmt: skip
    about = (
        f"{options.workdir}, step {one.step}, trained on: "
        f"{', '.join(str(p.group) for p in proposals)}.\n\n{made.note}."
    )
    training.write_recipe(paths.to_path(one.folder), config, about)
    paths.write_text(file, json.dumps({"how": how, "note": made.note}, indent=2) + "\n")
    tell(made.note)
    return made.note


def compared(one: Round, failed: list[Group]) -> Comparison:
    """Compare before and after on the half that judges."""
    before, after = (verdicts_of(one, name, JUDGE) for name in (BEFORE, AFTER))
    return comparison.compare(before, after, one.of, failed, least=one.options.least)


def write_result(
    one: Round, findings: list[Finding], proposals: list[Proposal], note: str,
    found: Comparison | None,
) -> dict[str, Any]:  # fmt: skip
    """Write improve.json, and return what it has."""
    content: dict[str, Any] = {
        "workdir": one.options.workdir,
        "step": one.step,
        "split": one.split,
        "judge": one.judge,
        "group_by": one.grouping,
        "prompts": {half: len(texts) for half, texts in one.prompts.items()},
        "findings": [f.to_dict() for f in findings],
        "proposals": [p.to_dict() for p in proposals],
        "material": note,
        "run": str(one.stored(training.RUN)) if found else None,
        "comparison": found.to_dict() if found else None,
    }
    paths.write_text(one.stored(RESULT), json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return content
