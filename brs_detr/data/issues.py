"""The kinds of issues of a dataset and what training does about each, in one table, and the log that counts them.

`check-data` prints the table, the annotation reader counts by it, and the documentation quotes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from brs_detr.exit_codes import Failure
from brs_detr.user_files import printable

KEPT = "kept"
REPAIRED = "repaired"
DROPPED = "dropped"
WARNED = "warned"  # kept, but reported first: it may hurt training

# kind: (action, explanation for the user)
POLICY: dict[str, tuple[str, str]] = {
    # images
    "image_malformed": (DROPPED, "an image entry without a usable id or file name is dropped, with its annotations"),
    "image_id_duplicate": (
        WARNED,
        "the first image entry with an id is kept, with the annotations of all of them; later ones are dropped",
    ),
    "image_too_small": (DROPPED, "images with a side under data.min_side are left out of training"),
    "image_without_objects": (KEPT, "kept as background (data.keep_empty=false leaves it out of training)"),
    "size_missing": (REPAIRED, "the image's own size is used"),
    "size_mismatch": (
        REPAIRED,
        "boxes that fit the json's size are scaled to an image of that aspect ratio; boxes that do not fit are taken "
        "in the image's own frame",
    ),
    "size_of_other_shape": (
        WARNED,
        "the boxes would fit both; they are taken in the image's own frame, which is wrong if it was stretched: look "
        "at the contact sheet",
    ),
    "image_missing": (DROPPED, "the image is left out"),
    "image_outside": (
        DROPPED,
        "a file name that leads out of the image folder is not followed (data.allow_outside_images=true follows it)",
    ),
    "image_elsewhere": (REPAIRED, "the one image under the image folder whose path agrees with the name is used"),
    "image_listed_twice": (WARNED, "used once per entry, each time with the annotations of that entry only"),
    "image_in_both_splits": (WARNED, "trained on and evaluated on: the figures will be too good"),
    "image_unreadable": (DROPPED, "left out; in training another one takes its place where only decoding tells"),
    "image_turned": (REPAIRED, "the json's size, or its shape, is the upright one: the EXIF rotation is applied"),
    "image_not_turned": (KEPT, "the json's size is the stored one: the EXIF rotation is not applied"),
    "image_mirrored": (
        WARNED,
        "the size cannot tell whether this EXIF turn was applied; pixels are taken as stored: look at them",
    ),
    "image_converted": (REPAIRED, "converted to 8-bit RGB"),
    "image_name_misleads": (KEPT, "read by its content, not by its name"),
    "image_name_unusual": (KEPT, "spaces and letters outside ASCII in a file name are fine"),
    "image_has_pages": (KEPT, "of several pages or frames the first is used"),
    "image_uniform": (WARNED, "used, but it is almost of one color: look at it"),
    "image_dark": (
        WARNED,
        "used, but nothing in it is bright: 10- to 14-bit values in a 16-bit file are better stretched beforehand",
    ),
    "image_part_blank": (WARNED, "used, but a part of it is blank, by design or from a damaged file: look at it"),
    "image_not_listed": (KEPT, "a file that no image entry names is not used"),
    # annotations
    "annotation_malformed": (DROPPED, "an annotation that is no object, or lacks its image or category id, is dropped"),
    "annotation_id_duplicate": (KEPT, "both are kept; ids of annotations are not used"),
    "image_id_unknown": (DROPPED, "an annotation of an image that is not listed is dropped"),
    "category_id_unknown": (DROPPED, "an annotation of a category that is not listed is dropped"),
    "category_ids_shifted": (WARNED, "used as they stand: are the categories counted from 1, the annotations from 0?"),
    "number_as_text": (REPAIRED, "a number in quotes is read as that number"),
    "crowd": (DROPPED, "background in training; an ignored region in evaluation"),
    "ignored": (DROPPED, "annotations marked `ignore` are background in training; ignored in evaluation"),
    "iscrowd_missing": (REPAIRED, "taken as 0"),
    "area_missing": (REPAIRED, "width times height is used"),
    "area_not_positive": (REPAIRED, "width times height is used"),
    "box_from_mask": (REPAIRED, "an annotation without a box gets the one around its polygons or mask"),
    "box_missing": (DROPPED, "an annotation with neither a box nor a mask is dropped"),
    "box_not_four_numbers": (DROPPED, "a box must be four numbers x, y, width, height"),
    "box_not_finite": (DROPPED, "a box with NaN or infinity is dropped"),
    "box_negative": (DROPPED, "a box of negative width or height is dropped"),
    "box_empty": (DROPPED, "a box of width or height 0 is dropped"),
    "box_too_small": (DROPPED, "a box under 1 pixel wide or high, after clipping, is dropped"),
    "box_outside": (DROPPED, "a box wholly outside its image is dropped"),
    "box_clipped": (REPAIRED, "a box partly outside its image is clipped to it"),
    "box_layout_doubtful": (WARNED, "read as x, y, width, height in pixels all the same: look at the contact sheet"),
    "box_duplicate": (DROPPED, "the same box and category on the same image is used once"),
    "mask_missing": (
        WARNED,
        "where masks are asked for, an object without polygons or run lengths has its box as mask",
    ),
    "mask_malformed": (WARNED, "polygons or run lengths that cannot be read are replaced by the box"),
    "mask_of_other_size": (WARNED, "run lengths of another size than their image are replaced by the box"),
    "mask_empty": (
        WARNED,
        "a mask without a pixel, for example of polygons too thin to hold the center of one, is replaced by the box in "
        "training and stays empty in evaluation",
    ),
    "mask_not_in_box": (
        WARNED,
        "both are used as they stand, although the box around the mask is another one: look at the contact sheet",
    ),
    # categories
    "category_name_duplicate": (KEPT, "two categories with one name stay two classes"),
    "category_unused": (KEPT, "a category without any annotation stays a class"),
    "category_name_missing": (REPAIRED, "the id is used as the name"),
}


_MAX_TEXT = 160  # characters of a location or a detail: values in a json may be arbitrarily long


class DataError(Failure, ValueError):
    """An unusable dataset; the message says what to fix."""


@dataclass(frozen=True)
class DataIssue:
    """One issue: its kind (a key of `POLICY`), its location, and a short detail."""

    kind: str
    where: str
    detail: str = ""

    @property
    def action(self) -> str:
        """Return what training does about it."""
        return POLICY[self.kind][0]

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.where}: {self.kind.replace('_', ' ')}{detail}: {self.action}"


class IssueLog:
    """Counter of issues by kind, with the first examples of each.

    Args:
        max_examples: number of issues of each kind to keep; None keeps all of them.
    """

    def __init__(self, max_examples: int | None = 3) -> None:
        self.counts: Counter[str] = Counter()
        self.issues: list[DataIssue] = []
        self._max_examples = max_examples

    def add(self, kind: str, where: str = "", detail: str = "") -> None:
        """Count an issue; `kind` is a key of `POLICY`."""
        if kind not in POLICY:
            raise KeyError(f"{kind} is not a kind of issue")
        self.counts[kind] += 1
        if self._max_examples is None or self.counts[kind] <= self._max_examples:
            # cut before and after: escaping a character can make it six characters long
            where, detail = (printable(text[:_MAX_TEXT])[:_MAX_TEXT] for text in (where, detail))
            self.issues.append(DataIssue(kind, where, detail))

    def lines(self, actions: Collection[str] = (WARNED, DROPPED, REPAIRED, KEPT)) -> list[str]:
        """Format one line per kind, the most serious first: count, first example, and the policy."""
        first = {issue.kind: issue for issue in reversed(self.issues)}
        lines = []
        for action in actions:
            for kind in (kind for kind in self.counts if POLICY[kind][0] == action):
                example = first[kind].where + (f" ({first[kind].detail})" if first[kind].detail else "")
                lines.append(f"{self.counts[kind]:,} x {kind.replace('_', ' ')}, first: {example}; {POLICY[kind][1]}")
        return lines
