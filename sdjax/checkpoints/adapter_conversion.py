"""The conversions of `sdjax.convert` that write a file of an adapter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from sdjax.checkpoints import adapters as named
from sdjax.checkpoints.reading import read_any
from sdjax.errors import UserError
from sdjax.families.family import Model, with_task
from sdjax.formats.adapters.extraction import DYNAMIC, Ranks, extract, resize
from sdjax.formats.adapters.layers import Adapter
from sdjax.formats.adapters.reading import adapter_file, adapter_task, read_adapter
from sdjax.formats.adapters.recognition import release_of
from sdjax.formats.adapters.writing import write_diffusers_adapter, write_kohya_adapter
from sdjax.formats.folders import ModelError
from sdjax.formats.single_file import Hints
from sdjax.models.weights import read_header
from sdjax.system import locks, paths

FORMATS = ("kohya", "diffusers")
_OF_KOHYA = ("ss_", "modelspec.", "sshs_")  # entries of metadata that outlive a conversion


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """The options of `sdjax.convert` about adapters.

    form: the layout to write, of `FORMATS`; "" for kohya's.
    base: the model that the adapter changes; "" where a file's own names tell.
    extract: the rank of the adapter to make of the difference of two models; None for none.
    rank: the rank to bring a LoRA to; None leaves it.
    dynamic: "RULE:NUMBER" by which ranks follow from singular values, up to `rank`; see `DYNAMIC`.
    """

    form: str = ""
    base: str = ""
    extract: int | None = None
    rank: int | None = None
    dynamic: str = ""

    @property
    def asked(self) -> bool:
        """Whether an adapter is to be written."""
        return bool(self.form) or self.extract is not None

    def check(self) -> None:
        """Raise a UserError if the options contradict one another."""
        for name, value in (("extract_lora", self.extract), ("lora_rank", self.rank)):
            if value is not None and value < 1:
                raise UserError(f"--{name}={value}; expected 1 or more")
        if self.extract is not None and not self.base:
            raise UserError("--extract_lora makes an adapter of --input and --base; give --base")
        given = {
            "base": bool(self.base),
            "lora_rank": self.rank is not None,
            "lora_dynamic": bool(self.dynamic),
        }
        for name in ("lora_rank", "lora_dynamic"):
            if self.extract is not None and given[name]:
                raise UserError(f"--{name} is for --format; --extract_lora says the rank itself")
        for name, is_given in given.items():
            if is_given and not self.asked:
                raise UserError(f"--{name} is for --format or --extract_lora; give one of them")
        self.ranks()

    def ranks(self) -> Ranks | None:
        """Return the ranks to bring a LoRA to; None leaves them.

        Raises:
            UserError: `dynamic` has another form, or a number out of its range.
        """
        if not self.dynamic:
            return None if self.rank is None else Ranks(self.rank)
        rule, _, text = self.dynamic.partition(":")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        fits = 1 < number < math.inf if rule == "sv_ratio" else 0 < number <= 1
        if rule not in DYNAMIC or not fits:
            raise UserError(
                f"--lora_dynamic={self.dynamic}: expected sv_fro:SHARE or sv_cumulative:SHARE with "
                "a share in (0, 1], or sv_ratio:NUMBER with a number above 1"
            )
        return Ranks(self.rank, rule, number)


def convert_adapter(
    source: paths.PathLike,
    target: paths.PathLike,
    options: AdapterOptions,
    *,
    weights: str,
    step: int | None,
    dtype: str,
    force: bool,
    hints: Hints,
) -> list[str]:
    """Write a file of an adapter; what was done, as lines for the user.

    Args:
        source: a file of an adapter or its folder, the workdir of a run that trained one; or, to
            extract one, a model.
        target: the file; or a folder, for diffusers.
        weights, step: of a workdir.
        hints: what single files of models do not say.

    Raises:
        ModelError, CheckpointError: it cannot be read, or has no form in the layout.
    """
    options.check()
    target = paths.to_path(target)
    _check_target(target, paths.to_path(source), options.form, force)
    with locks.replacing(target, "--output", "sdjax.convert"):
        metadata: dict[str, str] = {}
        if options.extract is not None:
            base = read_any(options.base, hints=hints)
            tuned = read_any(source, weights=weights, step=step, hints=hints)
            model, (adapter, shares) = tuned, extract(base, tuned, options.extract)
            lines = [
                f"{network}: rank {options.extract} keeps {share:.2%} of the change's squared norm"
                for network, share in shares.items()
            ]
        elif named.is_run(source):
            model, adapter = named.read_run(source, weights, step)
            lines = [f"read an adapter of {len(adapter)} modules from {source}"]
        else:
            model, adapter, metadata = _read_file(source, options.base, hints)
            title = model.family.title
            lines = [f"read an adapter of {len(adapter)} modules of {title} from {source}"]
        if (ranks := options.ranks()) is not None:
            adapter, kept = resize(adapter, ranks, model)
            lines.append(f"{_ranks(adapter)}: {kept:.2%} of the changes' squared norm is kept")
        write = _writer(options.form, metadata)
        notes = write(target, model, adapter, dtype)
        return [*lines, f"wrote {target}, {dtype}", *notes]


def _ranks(adapter: Adapter) -> str:
    """The ranks of an adapter's layers in words."""
    found = [layer.rank for layer in adapter.values() if layer.rank] or [0]
    if min(found) == max(found):
        return f"rank {found[0]}"
    return f"ranks {min(found)} to {max(found)}, {sum(found) / len(found):.1f} on average"


def _check_target(target: paths.Path, source: paths.Path, form: str, force: bool) -> None:
    if form != "diffusers" and target.suffix != ".safetensors":
        raise ModelError(f"--output={target}: expected a name that ends in .safetensors")
    if paths.resolved(target) == paths.resolved(source):
        raise ModelError(f"--output={target} is --input; choose another name")
    file = target if target.suffix else target / "pytorch_lora_weights.safetensors"
    if paths.exists(file) and not force:
        raise ModelError(f"{file} is there already; choose another name, or --force to replace it")


def _read_file(
    source: paths.PathLike, base: str, hints: Hints
) -> tuple[Model, Adapter, dict[str, str]]:
    """(model without parameters, adapter, its metadata of kohya) of a file."""
    file = adapter_file(source)
    model = read_any(base, with_weights=False, hints=hints) if base else release_of(file)
    model = with_task(model, adapter_task(file, model))
    said = read_header(file)[1]
    kept = {key: value for key, value in said.items() if key.startswith(_OF_KOHYA)}
    # Those would no longer be true, or are told anew.
    for key in ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args",
                "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"):  # fmt: skip
        kept.pop(key, None)
    return model, read_adapter(file, model), kept


Write = Callable[[paths.Path, Model, Adapter, str], list[str]]


def _writer(form: str, metadata: dict[str, str]) -> Write:
    if form == "diffusers":
        return lambda target, model, adapter, dtype: write_diffusers_adapter(
            target, model, adapter, dtype=dtype
        )
    return lambda target, model, adapter, dtype: write_kohya_adapter(
        target, model, adapter, metadata, dtype=dtype
    )
