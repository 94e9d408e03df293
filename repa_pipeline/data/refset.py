"""The reference's preprocessed data (its `dataset_tools.py` output) as a source and for import.

images/00000/img00000000.png      the prepared images
vae-sd/00000/img-mean-std-00000000.npy   float32 [8, h, w] moments of each, the same order
dataset.json                      {"labels": [["00000/img00000000.png", 3], ...]} or null; at the
                                  root, in images/ or in vae-sd/ (there with the npy names)

A folder on any file system or one zip; also what lies in images/ alone, beside its dataset.json.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from repa_pipeline.data.archives import find_archives
from repa_pipeline.data.files import Files
from repa_pipeline.data.items import Item, finish_items, is_image_name
from repa_pipeline.data.patterns import archive_kind
from repa_pipeline.data.remote import open_filesystem
from repa_pipeline.data.tree import FolderTree, Member, Tree
from repa_pipeline.data.zipfiles import ZipTree
from repa_pipeline.errors import DataError, MissingError

IMAGES, LATENTS, LABELS = "images", "vae-sd", "dataset.json"
_LATENT_MARK = "-mean-std-"


class RefSet:
    """A reference set; as a source it lists the images. Safe to use from several threads.

    Keys of images are names relative to images/, keys of latents those relative to vae-sd/.
    """

    class_names: tuple[str, ...] | None = None

    def __init__(self, url: str, tree: Tree):
        self.url = url
        self.is_remote = tree.is_remote
        self._tree = tree
        self._lock = threading.RLock()
        self._remarks: tuple[str, ...] = ()
        self._given: tuple[str, Mapping[str, int] | None] | None = None
        self._members: dict[str, list[Member]] = {}

    @property
    def remarks(self) -> tuple[str, ...]:
        """Which file the labels are from; complete after `items()`."""
        return self._remarks

    @property
    def labels(self) -> Mapping[str, int] | None:
        """The label of every image and of every latent by its key, None without labels."""
        if self._labels()[1] is None:
            return None
        items = [*self.image_items(), *self.latent_items()]
        return MappingProxyType({i.key: i.label for i in items if i.label is not None})

    def items(self) -> list[Item]:
        """Every image with its label, as every source lists them (by path, then offset).

        Raises MissingError without images, DataError on missing, extra or unusable labels.
        """
        found = self.image_items()
        if not found:
            raise MissingError(f"no images in {IMAGES}/ of {self.url}: check the path")
        return finish_items(found)

    def image_items(self) -> list[Item]:
        """Images sorted by name, as the reference sorts them; labels None without labels."""
        prefix = f"{IMAGES}/" if self._has_folders() else ""
        return self._items_of([m for m in self._files(IMAGES) if is_image_name(m.name)], prefix)

    def latent_items(self) -> list[Item]:
        """Moments (`.npy`) sorted by name, as the reference sorts them; [] without vae-sd/."""
        found = self._files(LATENTS) if self._has_folders() else []
        return self._items_of([m for m in found if m.name.endswith(".npy")], f"{LATENTS}/")

    def pairs(self) -> list[tuple[Item, Item]]:
        """(image, its latent) by sorted position, which is how the reference pairs them.

        Raises DataError when the counts differ, or when some names say that the positions do not
        belong together (img00000000.png goes with img-mean-std-00000000.npy).
        """
        images, latents = self.image_items(), self.latent_items()
        if len(images) != len(latents):
            raise DataError(
                f"{self.url} has {len(images)} images and {len(latents)} latents: expected as "
                "many, its preprocessing did not finish or files were lost"
            )
        pairs = list(zip(images, latents, strict=True))
        wrong = [(i, z) for i, z in pairs if _stem(i.key) != _stem(z.key)]
        common = {_stem(item.key) for item in images} & {_stem(item.key) for item in latents}
        if wrong and common:
            image, latent = wrong[0]
            raise DataError(
                f"{len(wrong)} of {len(pairs)} images of {self.url} do not meet their latent, "
                f"first {image.key} beside {latent.key}: files were lost or added"
            )
        return pairs

    def read(self, item: Item) -> bytes:
        """The bytes of an image or a latent; raises DamagedError or StoreError."""
        return self._tree.read(item)

    def groups(self, items: Sequence[Item]) -> list[list[int]]:
        return self._tree.groups(items)

    def read_group(self, items: Sequence[Item]) -> list[bytes]:
        return self._tree.read_group(items)

    def _has_folders(self) -> bool:
        return any(e.is_folder and e.name in (IMAGES, LATENTS) for e in self._tree.top())

    def _files(self, folder: str) -> list[Member]:
        """Files below images/ or vae-sd/ by name; of the whole tree when that is the images."""
        with self._lock:
            if folder not in self._members:
                self._members[folder] = self._walk(folder)
            return self._members[folder]

    def _walk(self, folder: str) -> list[Member]:
        if self._has_folders():
            return self._tree.walk([folder])[0] if self._has(folder) else []
        folders = [entry.name for entry in self._tree.top() if entry.is_folder]
        below = [member for members in self._tree.walk(folders) for member in members]
        return sorted([*self._tree.top_files(), *below])

    def _has(self, folder: str) -> bool:
        return any(e.is_folder and e.name == folder for e in self._tree.top())

    def _items_of(self, members: list[Member], prefix: str) -> list[Item]:
        names = [member.name.removeprefix(prefix) for member in members]
        if not names:
            return []
        where, given = self._labels()
        labels = [None] * len(names) if given is None else _match(names, given, self._name(where))
        triples = zip(members, names, labels, strict=True)
        return [member.item(name, label) for member, name, label in triples]

    def _name(self, where: str) -> str:
        return f"{where} of {self.url}"

    def _labels(self) -> tuple[str, Mapping[str, int] | None]:
        """The file of the labels, and the labels in it; the first file that has some."""
        with self._lock:
            if self._given is None:
                self._given = self._find_labels()
                where, labels = self._given
                said = f"labels from {where}" if labels is not None else f"no labels in {where}"
                self._remarks = (said,) if where else (f"no {LABELS}: one class",)
            return self._given

    def _find_labels(self) -> tuple[str, Mapping[str, int] | None]:
        folders = [f"{name}/" for name in (IMAGES, LATENTS) if self._has(name)]
        looked_at = ""
        for where in (f"{folder}{LABELS}" for folder in ("", *folders)):
            member = self._tree.find(where)
            if member is None:
                continue
            looked_at = looked_at or where
            labels = _parse_labels(self._tree.read(member.item(where, None)), self._name(where))
            if labels is not None:
                return where, labels
        return looked_at, None


def open_refset(url: str) -> RefSet:
    """Opens a reference set: a folder or a zip, local or by URL.

    Raises MissingError when nothing is there, DataError when it is no reference set.
    """
    if archive_kind(url) == "zip":
        tree: Tree = ZipTree(*find_archives(url))
    else:
        tree = FolderTree(Files(*open_filesystem(url)))
    try:
        found = refset_of(url, tree)
    except FileNotFoundError:
        raise MissingError(f"no reference set at '{url}': check the path") from None
    if found is None:
        raise DataError(
            f"'{url}' is no reference set: expected {IMAGES}/ with {LATENTS}/ or a {LABELS}"
        )
    return found


def refset_of(url: str, tree: Tree) -> RefSet | None:
    """The reference set that a tree is, None when it is something else.

    It is one when it holds vae-sd/; or images/ alone, with a dataset.json in it; or a dataset.json
    with "labels" beside images/ or, as in images/ itself, beside images or folders of them.
    """
    folders = {entry.name for entry in tree.top() if entry.is_folder}
    if LATENTS in folders:
        return RefSet(url, tree)
    if folders == {IMAGES} and tree.find(f"{IMAGES}/{LABELS}") is not None:
        return RefSet(url, tree)
    if any(entry.name == LABELS and not entry.is_folder for entry in tree.top()):
        member = tree.find(LABELS)
        if member is not None and _has_labels(tree.read(member.item(LABELS, None))):
            return RefSet(url, tree)
    return None


def _has_labels(content: bytes) -> bool:
    try:
        found = json.loads(content)
    except ValueError:
        return False
    return isinstance(found, dict) and "labels" in found


def _parse_labels(content: bytes, name: str) -> Mapping[str, int] | None:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise DataError(f"{name} is not JSON: {error}; copy it again") from None
    labels: Any = found.get("labels") if isinstance(found, dict) else found
    if labels is None or labels == []:
        return None
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    result: dict[str, int] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise DataError(f"{name} has the entry {str(pair)[:60]}: expected [name, label]")
        name_of_image, label = pair[0].replace("\\", "/"), pair[1]
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise DataError(
                f"{name} gives {name_of_image} the label {str(label)[:40]}: expected an integer "
                "of 0 or more"
            )
        if result.setdefault(name_of_image, label) != label:
            raise DataError(f"{name} gives {name_of_image} two labels: remove one")
    return result


def _match(names: list[str], labels: Mapping[str, int], where: str) -> list[int]:
    """The label of every name; npy names and image names of the same stem stand for each other."""
    if set(names) != labels.keys():
        labels = {_stem(name): label for name, label in labels.items()}
        stems = [_stem(name) for name in names]
        if len(set(stems)) != len(names):
            raise DataError(f"two files have one name but for the extension: {where} is ambiguous")
        names = stems
    missing = [name for name in names if name not in labels]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} files have no label in {where}, first "
            f"'{missing[0]}': finish the preprocessing or restore the file"
        )
    if len(labels) > len(names):
        present = set(names)
        extra = next(name for name in labels if name not in present)
        raise DataError(
            f"{where} has {len(labels)} labels for {len(names)} files, first extra "
            f"'{extra}': files were lost, restore them"
        )
    return [labels[name] for name in names]


def _stem(name: str) -> str:
    """What an image, its latent and its label have in common: '00000/img00000000'."""
    folder, _, base = name.removeprefix(f"{IMAGES}/").rpartition("/")
    stem = base.rpartition(".")[0].replace(_LATENT_MARK, "")
    return f"{folder}/{stem}" if folder else stem
