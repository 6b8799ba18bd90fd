"""The views besides drawing that the options of `sdjax.serve` ask for."""

from __future__ import annotations

import argparse
import dataclasses
import threading

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from sdjax.errors import UserError
from sdjax.system import paths
from sdjax.web.look import pages as looking
from sdjax.web.look.captions import MendedCaptions
from sdjax.web.look.collection import Collection
from sdjax.web.server.site import Place
from sdjax.web.watch import pages as watching
from sdjax.web.watch.runs import Runs


@dataclasses.dataclass(frozen=True)
class Views:
    """The views.

    routes: theirs. places: all of the server, drawing among them. names: what is served, in words.
    ending: to be set when the server stops.
    """

    routes: list[Route]
    places: list[Place]
    names: list[str]
    ending: threading.Event


def open_views(args: argparse.Namespace, *, trusted: bool) -> Views:
    """Return the views of --workdir and --data.

    Args:
        trusted: whether the server has a token.

    Raises:
        UserError: a folder is not there, or is of another kind.
    """
    places = [Place("Draw", "/")] if args.model else []
    if args.workdir:
        places.append(Place("Watch", watching.ADDRESS))
    if args.data:
        places.append(Place("Look", looking.ADDRESS))
    routes: list[Route] = []
    names: list[str] = []
    ending = threading.Event()
    if args.workdir:
        folders = _folders(args.workdir, there=args.handed is None)
        watch = watching.Watch(Runs(folders), trusted, places, ending)
        routes += watch.routes()
        names += args.workdir
    if args.data:
        routes += _look(args, trusted, places).routes()
        names += args.data
    if not args.model:
        first = places[0].address

        async def root(http: Request) -> Response:
            return RedirectResponse(first.removeprefix("/"))

        routes.append(Route("/", root, methods=["GET"]))
    return Views(routes, places, names, ending)


def _look(args: argparse.Namespace, trusted: bool, places: list[Place]) -> looking.Look:
    folders = [paths.to_path(name) for name in args.data]
    for name, folder in zip(args.data, folders, strict=True):
        if not paths.exists(folder) or not folder.is_dir():
            raise UserError(
                f"--data={name}: there is no such folder; expected a folder of pictures, or the "
                "--output of sdjax.prepare (tars and parquet are looked at once they are prepared)"
            )
    captions = None
    if args.captions:
        if len(folders) > 1:
            raise UserError("--captions=FILE goes with one --data=DIR, whose captions it mends")
        captions = MendedCaptions(paths.to_path(args.captions), folders)
    collections = {
        name: Collection(name, folder) for name, folder in zip(args.data, folders, strict=True)
    }
    return looking.Look(collections, captions, trusted, places)


def _folders(named: list[str], *, there: bool) -> list[paths.Path]:
    """Return the folders of --workdir, which need not have a run yet.

    there: whether they must be there; that of a run which begins is not.
    """
    found = []
    for name in named:
        folder = paths.to_path(name)
        if there and (not paths.exists(folder) or not folder.is_dir()):
            raise UserError(
                f"--workdir={name}: there is no such folder; expected that of a run, or one that "
                "has runs in it"
            )
        found.append(folder)
    return found
