"""Files that list images and captions: COCO's JSON, Karpathy's splits, and tables."""

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from model_lib.data.captions import has_value, marked_by
from model_lib.data.coco import CocoCaptions, name_id, parse_captions, parse_lists, typed
from model_lib.data.tables import read_table
from model_lib.errors import UserError
from model_lib.ingest.image_source import ImageSource, open_list
from model_lib.ingest.listing import ABSOLUTE, Listing
from model_lib.io.errors import input_errors

KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""Karpathy's splits, and ours that their images go to."""
SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of splits in other data sets, and ours."""
KARPATHY_FORM = (
    'Karpathy\'s splits; expected {"images": [{"cocoid", "filepath", "filename", "split", '
    '"sentences": [{"raw"}]}]}'
)


def splits_of(uris: Collection[str], split: str) -> dict[str, str]:
    """Return the split of each file: if all have one in their names, as train-00000.parquet or
    validation/a.tar, it is that; if none of these is for validation, training files are "auto"."""
    own = {uri: _split_in(uri) for uri in uris}
    if split != "auto" or not all(own.values()):
        return dict.fromkeys(uris, split)
    train = "train" if "val" in own.values() else "auto"
    return {uri: train if name == "train" else str(name) for uri, name in own.items()}


def _split_in(uri: str) -> str | None:
    path = PurePosixPath(uri)
    words = (re.split(r"[-_.]", path.name)[0], path.parent.name)
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), None)


def parse_coco(uri: str, names: Mapping[str, str] | None = None) -> CocoCaptions:
    with open_list(uri) as file:
        return parse_captions(file, uri, names)


def add_coco(
    listing: Listing,
    uri: str,
    source: ImageSource,
    split: str,
    names: Mapping[str, str] | None = None,
) -> None:
    """Add the images of a COCO captions file, by image id."""
    listed = parse_coco(uri, names)
    for reason, detail in listed.rejected:
        listing.reject("", reason, detail)
    seen = set()
    for image_id, name in sorted(listed.images):
        if image_id in seen:
            listing.reject_duplicate(name, image_id)
            continue
        seen.add(image_id)
        texts = listed.captions.pop(image_id, [])
        captions = listing.usable(name, texts, f"image id {image_id}")
        listing.add(image_id, name, split, source, captions)
    for image_id, texts in sorted(listed.captions.items()):
        detail = f"{uri} has no image of id {image_id}, but {len(texts)} captions of it"
        listing.reject("", "caption_without_image", detail)


def add_karpathy(
    listing: Listing, uri: str, source: ImageSource | Mapping[int, tuple[ImageSource, str]]
) -> None:
    """Add the images of Karpathy's splits, by the list's names or each id's own source and name."""
    rows: dict[int, tuple[str, str, list[str]]] = {}
    with open_list(uri) as file, input_errors(uri, KARPATHY_FORM):
        for _, image in parse_lists(file, "images"):
            image_id = typed(image["cocoid"] if "cocoid" in image else image["imgid"], int)
            folder, name = typed(image.get("filepath", ""), str), typed(image["filename"], str)
            name = f"{folder}/{name}" if folder and name else folder or name
            if image["split"] not in KARPATHY:
                splits = ", ".join(KARPATHY)
                raise ValueError(f"image {image_id} is of split {image['split']!r}, not {splits}")
            split = KARPATHY[image["split"]]
            texts = [typed(sentence["raw"], str) for sentence in image["sentences"]]
            if image_id not in rows:
                rows[image_id] = name, split, texts
            elif rows[image_id][1] == split:
                listing.reject_duplicate(name, image_id)
            else:
                both = " and ".join(sorted({split, rows[image_id][1]}))
                message = f"leaks: image {image_id} is in both {both}; keep it in one of them"
                raise UserError(f"{uri}: {message}")
    for image_id, (name, split, texts) in sorted(rows.items()):
        captions = listing.usable(name, texts, f"image id {image_id}")
        if not isinstance(source, Mapping):
            listing.add(image_id, name, split, source, captions)
        elif image_id in source:
            coco_source, coco_name = source[image_id]
            listing.add(image_id, coco_name, split, coco_source, captions)
        else:
            detail = f"image id {image_id} is in neither of COCO's captions files"
            listing.reject(name, "missing", detail)


def read_rows(
    images: "CaptionsByName", uri: str, folder: str, names: Mapping[str, str] | None = None
) -> None:
    """Add the rows of a table, whose names are below `folder` of the images' source."""
    for row in read_table(uri, names):
        name, problem = row.values.get("file"), row.problem
        if not problem and not has_value(name):
            problem = "has no file name"
        elif not problem and not isinstance(name, str):
            problem = f"has {name!r:.60} for a file name"
        if problem:
            images.listing.reject("", "bad_row", f"row {row.number} {problem}")
        else:
            name = str(name).strip().removeprefix("./")
            is_below = folder and not ABSOLUTE.match(name)
            images.add(f"{folder}/{name}" if is_below else name, row.number, row.values)


class CaptionsByName:
    """The captions and the split of each image, from rows that may be several an image, and in
    several lists."""

    def __init__(self, listing: Listing, split: str) -> None:
        self.listing, self.split = listing, split
        self.rows: dict[str, tuple[str, list[str]]] = {}

    def add(self, name: str, number: int, values: Mapping[str, Any]) -> None:
        """Add a row's captions, one or a list, to its image; or reject the row."""
        split, row = self.split, f"row {number}"
        own = values.get("split")
        if has_value(own):
            own_split = SPLITS.get(str(own).strip().casefold())
            if own_split is None:
                detail = f"{row} is of split {own!r:.60}, not train, val or test"
                self.listing.reject(name, "bad_row", detail)
                return
            if split not in ("auto", own_split):
                detail = f"{row} is of split {own_split}, not {split}"
                self.listing.reject(name, "other_split", detail)
                return
            split = own_split
        first_split, captions = self.rows.setdefault(name, (split, []))
        if first_split != split:
            detail = f"{row} is of split {split}, an earlier one of the same image of {first_split}"
            self.listing.reject(name, "other_split", detail)
        elif mark := marked_by(values):
            self.listing.reject(name, "caption_rejected", f"{row} is marked {mark}")
        else:
            captions += self.listing.usable(name, values.get("caption"), row)

    def list_in(self, source: ImageSource) -> None:
        """Add the images to the listing; ids and splits depend on their names alone."""
        splits = {name: split for name, (split, _) in self.rows.items()}
        if set(splits.values()) == {"auto"}:
            splits = splits_of(splits, "auto")
        for name in sorted(self.rows, key=name_id):
            self.listing.add(name_id(name), name, splits[name], source, self.rows[name][1])
