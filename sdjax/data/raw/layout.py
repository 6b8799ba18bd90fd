"""The parts of a folder of pictures: metadata files, pictures, captions, splits.

The reference for layouts is the imagefolder of Hugging Face `datasets`
(packaged_modules/folder_based_builder, data_files.py), with two differences. The name of a picture
makes no split, and a folder named like a split is a class where its neighbours are classes.
"""

from __future__ import annotations

import dataclasses
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from sdjax.data.raw.rows import CAPTION_SUFFIXES, IMAGE_SUFFIXES, Shard, ending, split_word

_LIKE_SPLITS = re.compile("train|test|val", re.IGNORECASE)
_IMAGES, _CAPTIONS = frozenset(IMAGE_SUFFIXES), frozenset(CAPTION_SUFFIXES)


class FolderContents:
    """The pictures and other files of a folder, added folder by folder.

    It keeps the names of pictures until there is a metadata file. From then on it keeps 10 bytes of
    each, which are enough to count the pictures that no metadata file names.
    """

    def __init__(self) -> None:
        self.metadata: list[str] = []  # files below the root
        self.names: list[str] = []  # pictures: files below the root
        self.captions: list[str] = []  # for each picture, the ending of its caption, or ""
        self._others: Counter[str] = Counter()  # files by ending
        self._captions: Counter[str] = Counter()
        self._unused: Counter[str] = Counter()  # unread captions, if there is no metadata file
        self._pictures, self._named = array("q"), array("q")  # hashes of names
        self._endings: array[int] = array("H")  # of each of `_pictures`, by number
        self._numbers: dict[str, int] = {}
        self._like_splits: dict[str, str] = {}  # {split: the first picture named after it}

    def add(self, folder: str, files: list[str], metadata: str) -> None:
        """Add the files of one folder; `metadata` is the one of them to be read, or ""."""
        if metadata:
            self.metadata.append(join(folder, metadata))
        pictures, texts = [], dict[str, dict[str, str]]()
        stems = set()  # of all files except captions
        for file in files:
            stem, end = file.rpartition(".")[0], ending(file)
            if end in _CAPTIONS:
                self._captions[end] += 1
                texts.setdefault(stem, {})[end] = file[len(stem) :]
                continue
            stems.add(stem)
            if end in _IMAGES:
                pictures.append(file)
            elif file != metadata:
                self._others[end] += 1
        for stem, found in texts.items():
            used = _first(found) if stem in stems else ""  # used even if the picture is unreadable
            self._unused.update(end for end in found if end != used)
        for file in pictures:
            found = texts.get(file.rpartition(".")[0], {})
            self.names.append(join(folder, file))
            self.captions.append(found.get(_first(found), ""))
            if _LIKE_SPLITS.match(file) and (split := split_word(file)):
                self._like_splits.setdefault(split, join(folder, file))
        if self.metadata:
            self._forget_names()

    def _forget_names(self) -> None:
        """Replace the names, which a metadata file has, by hashes."""
        self._pictures.extend(map(hash, self.names))
        for name in self.names:
            number = self._numbers.setdefault(ending(name), len(self._numbers))
            self._endings.append(number)
        self.names, self.captions = [], []

    def name(self, pictures: Iterable[str]) -> None:
        """Add the pictures that a metadata file names."""
        self._named.extend(map(hash, pictures))

    def unnamed(self) -> dict[str, int]:
        """The number of pictures that no metadata file names, by ending; {} without metadata."""
        pictures, named = (np.frombuffer(a, np.int64) for a in (self._pictures, self._named))
        left = np.frombuffer(self._endings, np.uint16)[~np.isin(pictures, named)]
        counts = np.bincount(left, minlength=len(self._numbers)).tolist()
        return {end: counts[number] for end, number in self._numbers.items() if counts[number]}

    def remarks(self, made: Collection[str]) -> list[str]:
        """A remark if pictures are named like splits, and no folder is."""
        if made or len(self._like_splits) < 2:
            return []
        return [f"names of pictures make no splits, though there are "
                f"{' and '.join(self._like_splits.values())}: put those of a split into a folder "
                "train/, validation/ or test/"]  # fmt: skip

    def passed_over(self) -> dict[str, int]:
        """The number of other files without a row, by ending."""
        return dict(self._others + (self._captions if self.metadata else self._unused))


def _first(found: Collection[str]) -> str:
    """The ending of the caption to read, of those beside a picture."""
    return next((end for end in CAPTION_SUFFIXES if end in found), "")


def join(folder: str, name: str) -> str:
    """A path below the root, where `folder` is "" for the root."""
    return f"{folder}/{name}" if folder else name


def split_folders(folders: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The splits of the folders that make splits, and remarks on those that could but do not.

    folders: all folders with pictures that are rows; "" is the root.

    A folder named like a split makes one if a neighbour is named `train`, or if two neighbours are
    named after different splits. It also makes one if no folder above it has a neighbour, and at
    most one of its own has another name. Among several of those (cat, dog, val) it is a class.
    Folders below one that makes a split belong to that split.
    """
    children: dict[str, dict[str, str]] = {}  # {folder: {folder in it: split it is named after}}
    for folder in folders:
        while folder:
            parent, _, name = folder.rpartition("/")
            if name in children.setdefault(parent, {}):
                break
            children[parent][name] = split_word(name)
            folder = parent
    made: dict[str, str] = {}
    remarks = []
    pending = [("", True)]
    while pending:
        parent, alone = pending.pop()
        named = children.get(parent, {})
        splits = {split for split in named.values() if split}
        others = sorted(name for name, split in named.items() if not split)
        makes = "train" in splits or len(splits) > 1 or (alone and len(others) < 2)
        for name, split in sorted(named.items()):
            path = join(parent, name)
            if split and makes:
                made[path] = split
                continue
            if split:
                beside = ", ".join(f"{other}/" for other in others[:3]) or "no other folder"
                remarks.append(
                    f"{path}/ is taken for a class, not for a split {split}: it stands beside "
                    f"{beside}; call the folder of the others train/ if it is one"
                )
            pending.append((path, alone and len(named) == 1))
    return made, sorted(remarks)


def maker(folder: str, made: Mapping[str, str]) -> str:
    """The folder of `made` that is `folder` or lies above it; "" for none."""
    while folder and folder not in made:
        folder = folder.rpartition("/")[0]
    return folder


def with_splits(shard: Shard, folders: Iterable[str], made: Mapping[str, str]) -> Shard:
    """A shard with the splits of its rows; the shard's own split is that of most rows."""
    splits = {folder: made.get(maker(folder, made), "train") for folder in folders}
    main = next(iter(splits.values()), "train")
    others = tuple((folder, split) for folder, split in splits.items() if split != main)
    return dataclasses.replace(shard, split=main, folders=others)


def made_by_folders(rows: Mapping[str, int], made: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """The counts of `Survey.made`."""
    counts: dict[str, dict[str, int]] = {}
    for folder, count in rows.items():
        above = maker(folder, made)
        reason = f"by the folder {above}/" if above else "in folders that make no split"
        of_split = counts.setdefault(made.get(above, "train"), {})
        of_split[reason] = of_split.get(reason, 0) + count
    return counts
