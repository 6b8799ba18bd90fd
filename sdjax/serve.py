"""Serve a model to the clients there are, and runs and data to a browser.

    python -m sdjax.serve --model=DIR
    python -m sdjax.serve --workdir=RUNS
    python -m sdjax.serve --data=PICTURES

One of the three, or several. The DIR of --model is a workdir of sdjax or a diffusers folder. The
server speaks the API of AUTOMATIC1111's web UI (/sdapi/v1) and the images of OpenAI's (/v1);
/metrics is for Prometheus. --workdir watches runs while they train, --data looks at pictures and
mends their captions; neither touches a device. It listens on this machine alone unless --host says
otherwise, which needs a token. Equal pictures that wait are drawn
together. docs/serving.md has examples. Needs `pip install "sdjax[serve]"`. Exit codes: 0 stopped by
SIGTERM, which waits for pictures that are being drawn; 2 the input or an option is wrong; 130
Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from sdjax.system.interrupts import install

    install("the same command serves again", terminated=0)

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from sdjax.errors import UserError, explain
from sdjax.sampling.options import (
    add_drawing_options,
    add_expert_option,
    add_lora_option,
    add_syntax_option,
    guidance_changes,
    sampler_changes,
)
from sdjax.system import paths, progress, untrusted
from sdjax.system.allocator import use_large_pages
from sdjax.system.listening import address, handed, is_loopback, listen
from sdjax.web.view_options import add_view_options, check_views

if TYPE_CHECKING:
    from sdjax.families.embeddings import Embedding
    from sdjax.families.family import Model
    from sdjax.train.monitoring.data_profile import Distribution
    from sdjax.web.server.adapters import Member
    from sdjax.web.server.fields import Limits
    from sdjax.web.server.loaded import LoadedModel
    from sdjax.web.server.service import Service

TOKEN_VARIABLE = "SDJAX_SERVE_TOKEN"
_SHORTEST_TOKEN = 16


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    own = "the model's own by default"
    p = argparse.ArgumentParser(
        prog="python -m sdjax.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--model", help="workdir of sdjax, or a diffusers folder, to draw with")
    add_view_options(p)
    add_expert_option(p)
    add_lora_option(p, "for --model, whose weight requests may change")
    p.add_argument(
        "--lora_sets", type=int, default=2,
        help="sets of weights of adapters whose parameters stay on the device; those of another "
        "are merged at its first request (%(default)s)",
    )  # fmt: skip
    add_syntax_option(p)
    p.add_argument(
        "--weights", default="ema",
        help="of a workdir: 'ema', 'raw', or the name of an average, as '0.9999' (%(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the computation (%(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--ratings", metavar="DIR",
        help="folder for what people say of pictures on the page, for `sdjax.prepare "
        "--from_ratings`; none are taken by default",
    )  # fmt: skip
    p.add_argument("--batch_size", type=int, default=4, help="drawn at once, at most (%(default)s)")
    p.add_argument(
        "--warm_up", action=argparse.BooleanOptionalAction, default=True,
        help="compile the model's own settings before the first request (yes)",
    )  # fmt: skip
    net = p.add_argument_group("where it listens, and for whom")
    net.add_argument(
        "--host", default="127.0.0.1",
        help="address to listen at; another than this machine's own needs a token (%(default)s)",
    )  # fmt: skip
    net.add_argument("--port", type=int, default=7860, help="0 for a free one (%(default)s)")
    net.add_argument(
        "--token_file", metavar="FILE",
        help=f"file with the token that every request must bring, or ${TOKEN_VARIABLE}: at least "
        f"{_SHORTEST_TOKEN} characters; as Authorization: Bearer, or as the password of Basic",
    )  # fmt: skip
    net.add_argument(
        "--allow_host", action="append", default=[], metavar="NAME",
        help="a further name by which the server may be asked, such as that of a proxy",
    )  # fmt: skip
    net.add_argument(
        "--allow_origin", action="append", default=[], metavar="ORIGIN",
        help="pages of another origin that may ask, as https://example.org (CORS; none)",
    )  # fmt: skip
    _add_limits(p.add_argument_group("limits, beyond which a request is refused in words"))
    group = p.add_argument_group("how to get from noise to picture, where a client does not say")
    add_drawing_options(group, own=own)
    return p


def _add_limits(group: argparse._ArgumentGroup) -> None:
    for name, default, about in (
        ("max_side", 2048, "pixels of a picture's side"),
        ("max_steps", 150, "steps of the sampler"),
        ("max_pictures", 16, "pictures of one request"),
        ("max_megabytes", 32, "size of a request"),
        ("queue", 64, "pictures that wait; more are answered with 503"),
        ("timeout", 600, "seconds of one request, waiting included"),
        ("rate", 600, "requests a minute of one address"),
    ):
        group.add_argument(f"--{name}", type=int, default=default, help=f"{about} (%(default)s)")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, serve until a signal comes, and give the exit code."""
    args = parser().parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    wrong: list[type[Exception]] = [UserError]
    if args.model:
        from sdjax.checkpoints.checkpoint import CheckpointError
        from sdjax.train.startup import enable_compilation_cache

        enable_compilation_cache("")
        wrong += [CheckpointError, ValueError, FloatingPointError]
    try:
        serve(args)
    except paths.storage_errors(*wrong) as error:
        return explain(error)
    return 0


def serve(args: argparse.Namespace) -> None:
    """Serve what the options of `parser` say until SIGTERM or Ctrl-C.

    Raises:
        UserError and its kin: the model or an option is wrong, or the port is taken.
    """
    try:
        import uvicorn  # noqa: F401, or what follows says that another package is missing

        from sdjax.web.server.gate import LOOPBACK
        from sdjax.web.server.running import run_site
        from sdjax.web.server.site import make_site
        from sdjax.web.server.views import open_views
    except ModuleNotFoundError as error:
        raise UserError(
            f'sdjax.serve needs {error.name}: install it by `pip install "sdjax[serve]"`'
        ) from error

    check_views(args)
    limits, token = _limits(args), _token(args)
    loopback = is_loopback(args.host)
    if not token and not loopback:
        raise UserError(
            f"--host={args.host} lets other machines in, which needs a token: put one of at least "
            f"{_SHORTEST_TOKEN} characters into a file and give --token_file=FILE"
        )
    # A port that is taken is an error now.
    listener = listen(args.host, args.port) if args.handed is None else handed(args.handed)
    views = open_views(args, trusted=bool(token))
    # Whoever has the token may ask by any name.
    hosts = (*LOOPBACK, args.host, *args.allow_host) if loopback and not token else ()
    if args.model:
        from sdjax.web.server.app import make_app

        with progress.shown():
            service = _service(args, limits)
        app = make_app(
            service, token=token, hosts=hosts, origins=args.allow_origin, others=views.routes,
            places=views.places,
        )  # fmt: skip
    else:
        app = make_site(views.routes, limits, token=token, hosts=hosts, origins=args.allow_origin)
    title = service.title if args.model else " and ".join(views.names)
    if args.handed is None:
        print(f"{title} is served at {address(listener, args.host)} (Ctrl-C stops)", flush=True)
    run_site(app, listener, views.ending, until_input_ends=args.handed is not None)


def _limits(args: argparse.Namespace) -> Limits:
    from sdjax.web.server.fields import Limits

    for name in ("max_side", "max_steps", "max_pictures", "max_megabytes", "queue", "timeout",
                 "rate", "batch_size", "lora_sets"):  # fmt: skip
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}; expected at least 1")
    return Limits(
        side=args.max_side, steps=args.max_steps, pictures=args.max_pictures, queue=args.queue,
        body=args.max_megabytes << 20, seconds=float(args.timeout), rate=args.rate,
    )  # fmt: skip


def _token(args: argparse.Namespace) -> str:
    """Return the token, "" where there is none. UserError if it is short, or cannot be read."""
    token, source = os.environ.get(TOKEN_VARIABLE, ""), f"${TOKEN_VARIABLE}"
    if args.token_file:
        source = f"--token_file={args.token_file}"
        try:
            token = untrusted.read_bytes(args.token_file, 4096).decode()
        except (OSError, UserError, UnicodeDecodeError) as error:
            raise UserError(f"{source} cannot be read: {error}") from error
    elif not token:
        return ""
    token = token.strip()
    if len(token) < _SHORTEST_TOKEN or not token.isascii():
        raise UserError(
            f"{source} has {len(token)} characters; expected at least {_SHORTEST_TOKEN}, of ASCII, "
            "as `openssl rand -hex 32` makes them"
        )
    return token


def _ratings_folder(args: argparse.Namespace) -> paths.Path | None:
    """Return the folder of --ratings, made if need be. UserError if it cannot be written to."""
    if not args.ratings:
        return None
    if paths.is_remote(args.ratings):
        raise UserError(
            f"--ratings={args.ratings} is in a bucket, where nothing can be appended to a file; "
            "give a local folder, and copy it"
        )
    folder = paths.to_path(args.ratings)
    paths.make_folder(folder)
    with paths.explained_writes(folder), tempfile.TemporaryFile(dir=folder):
        pass
    return folder


def _service(args: argparse.Namespace, limits: Limits) -> Service:
    """Return the model, compiled and ready."""
    from sdjax.web.server.engine import Engine
    from sdjax.web.server.ratings import RatingStore
    from sdjax.web.server.requests import PictureRequest
    from sdjax.web.server.service import Service
    from sdjax.web.server.statistics import Statistics

    folder = _ratings_folder(args)
    loaded, words, sha256 = _loaded(args)
    height, width = loaded.model.native_size
    own = loaded.own
    usual = PictureRequest("", "", 0, height, width, own.sampler, own.guidance)
    if args.warm_up:
        with progress.work("compiling"):
            loaded.warm_up(usual)
    tokenizer = next(iter(loaded.model.tokenizers.values()), None)
    statistics = Statistics(tokenizer, _profile(args.model))
    engine = Engine(loaded, queue=limits.queue, observe=statistics.observe)
    store = None if folder is None else RatingStore(folder, sha256, loaded.adapters)
    return Service(
        loaded, engine, limits, digest=sha256, words=words,
        negative=args.negative_prompt or "", place=args.model, ratings=store,
        statistics=statistics, experts=tuple(args.expert),
    )  # fmt: skip


def _profile(model: str) -> dict[str, Distribution]:
    """Return the profile of the training data: in the workdir, or in that around DIR/diffusers."""
    from sdjax.train.monitoring.data_profile import read_profile

    folder = paths.absolute(model)
    own = read_profile(folder)
    return read_profile(folder.parent) if not own and folder.name == "diffusers" else own


def _loaded(args: argparse.Namespace) -> tuple[LoadedModel, tuple[str, ...], str]:
    """Return the model of the options, the words of --embedding, and the digest of the weights."""
    import jax.numpy as jnp

    from sdjax.checkpoints.references import digest
    from sdjax.families.sampler import choose_sampler, sampler_note
    from sdjax.sampling.a1111 import PromptEmbedder
    from sdjax.sampling.generate import check_guidance, drawing_of, settings_of
    from sdjax.web.server.adapters import Adapters
    from sdjax.web.server.loaded import LoadedModel

    name = f"--model={args.model}"
    model, words, member = _read(args, args.model, name)
    if model.missing():
        raise UserError(
            f"{name} has {', '.join(model.networks) or 'no network'} only; drawing takes "
            f"{model.family.denoiser}, vae, and a text encoder with its tokenizer"
        )
    check_guidance(model, guidance_changes(args), name)
    sampler = choose_sampler(model, sampler_changes(args), name)
    if note := sampler_note(model, sampler, name):
        print(note, file=sys.stderr)
    drawing = drawing_of(settings_of(model), sampler, guidance_changes(args))
    shown = paths.absolute(paths.to_path(args.model)).name or "model"
    values, bounds, members = model.params, None, [member]
    if args.expert:
        values, bounds, members = _with_experts(args, model)
    adapters = Adapters(members if args.lora else (), kept=args.lora_sets)
    started = adapters.params(adapters.start)
    params = {path: jnp.asarray(own) for path, own in values.items() if path not in started}
    bare = dataclasses.replace(model, params={})
    weighed = args.prompt_syntax == "a1111"
    loaded = LoadedModel(
        bare, params, shown, drawing, args.dtype, args.batch_size, bounds=bounds,
        adapters=adapters,
        embedder=PromptEmbedder(bare, dtype=args.dtype) if weighed else None,
    )  # fmt: skip
    sha256 = digest(values).partition(":")[2]
    return loaded, tuple(word.token for word in words), sha256


def _read(args: argparse.Namespace, place: str, name: str) -> tuple[Model, list[Embedding], Member]:
    """Return a model as the options have it, the words of --embedding, and what --lora changes."""
    from sdjax.checkpoints.adapters import merged_loras, read_loras
    from sdjax.checkpoints.reading import read_any
    from sdjax.families.conditioning import with_text_length
    from sdjax.formats.embeddings import with_files
    from sdjax.web.server.adapters import make_member

    bare, loras = read_loras(read_any(place, weights=args.weights), args.lora)
    model = merged_loras(bare, loras, [lora.weight for lora in loras])
    if args.max_sequence_length is not None and not model.missing():
        model = with_text_length(model, args.max_sequence_length, name)
    model, words = with_files(model, args.embedding)
    return model, words, make_member(bare, loras, model)


def _with_experts(
    args: argparse.Namespace, model: Model
) -> tuple[dict[str, Any], tuple[float, ...], list[Member]]:
    """Return the parameters of a model with experts, the timesteps between these, and what --lora
    changes of each."""
    from sdjax.checkpoints.experts import read_expert_option
    from sdjax.sampling.ensemble import Expert, check_experts, ordered, params_of_experts

    read: list[Expert] = []
    members: dict[str, Member] = {}
    for option in args.expert:
        (place, levels), name = read_expert_option(option), f"--expert={option}"
        own, _, members[name] = _read(args, place, name)
        read.append(Expert(name, own, levels))
    order = ordered(read)
    bounds = check_experts(model, order)
    tokenizers = {field: own.identity for field, own in model.tokenizers.items()}
    for expert in order:
        theirs = {field: own.identity for field, own in expert.model.tokenizers.items()}
        if dict(expert.model.networks) != dict(model.networks) or theirs != tokenizers:
            raise UserError(
                f"{expert.name} has other networks or tokenizers than --model, and is not served; "
                "sdjax.sample draws with it"
            )
    numbered = [
        dataclasses.replace(members[each.name], number=i) for i, each in enumerate(order, 1)
    ]
    values = params_of_experts(model.params, [each.model.params for each in order])
    return values, tuple(bounds), numbered


if __name__ == "__main__":
    use_large_pages()
    sys.exit(main())
