"""Pascal VOC folders as tools and people leave them."""

import json
import unicodedata

import pytest

from brs_detr.data.coco import CocoDetection
from brs_detr.data.formats.base import to_coco
from brs_detr.data.formats.voc import read_voc
from brs_detr.data.issues import DataError

BOX = (11, 6, 30, 25)
XYWH = [11, 6, 19, 19]


def thing(name="cat", box=BOX, extra=""):
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


TWO_BOXES = thing().removesuffix("</object>") + thing(box=(1, 1, 3, 4)).removeprefix("<object><name>cat</name>")


def annotation(*things, filename="x.jpg", size=(80, 40), head="", attributes=""):
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    tag = f"<filename>{filename}</filename>" if filename is not None else ""
    return f"{head}<annotation{attributes}>{tag}<path>/gone/x.jpg</path>{sides}{''.join(things)}</annotation>"


@pytest.fixture()
def voc(tmp_path, write_image):
    """`voc({stem: xml or None}, lists={name: text}, annotations=, images=, ending=)`: a folder of that kind."""

    def make(xmls, lists=(), *, annotations="Annotations", images="JPEGImages", ending=".jpg", root=tmp_path):
        for stem, xml in xmls.items():
            write_image(root / images / f"{stem}{ending}")
            if xml is not None:
                path = root / annotations / f"{stem}.xml"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(xml if isinstance(xml, bytes) else xml.encode())
        for name, text in dict(lists).items():
            path = root / "ImageSets" / "Main" / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    return make


def boxes_of(imported, split="train"):
    return {sample.path.name: [item["bbox"] for item in sample.objects] for sample in imported.splits[split]}


def notes_of(imported):
    return "\n".join(imported.notes.lines())


def splits_of(imported):
    return {split: [sample.path.stem for sample in samples] for split, samples in imported.splits.items()}


def test_corners_as_tools_write_them_and_as_the_original_counts(voc, tmp_path):
    voc({"a": annotation(thing(), thing("dog", (1, 1, 80, 40)))})
    assert boxes_of(read_voc(tmp_path)) == {"a.jpg": [XYWH, [1, 1, 79, 39]]}
    assert boxes_of(read_voc(tmp_path, one_based=True)) == {"a.jpg": [[10, 5, 20, 20], [0, 0, 80, 40]]}


def test_corners_from_zero_are_noted_where_they_should_count_from_one(voc, tmp_path):
    voc({"a": annotation(thing(box=(0, 0, 9, 9)))})
    assert "check --one-based" in notes_of(read_voc(tmp_path, one_based=True))
    assert not read_voc(tmp_path).notes.places


def test_lists_tell_the_splits_and_lists_about_one_class_do_not(voc):
    lists = {
        "train": "a b\r\n1\r\n",
        "valid": "2.jpg\n",
        "trainval": "1\n2\na b\ngone\n",
        "test": "000099\n",
        "cat_train": "1  1\na b -1\n",
        "dog_valid": "2\n",
        "fold_1": "1\n",
    }
    dogs = annotation(thing(), thing("dog"))
    imported = read_voc(voc({"1": annotation(thing()), "2": dogs, "a b": annotation(), "3": annotation()}, lists))
    assert splits_of(imported) == {"fold_1": ["1"], "train": ["a b", "1"], "trainval": ["1", "2", "a b"], "val": ["2"]}
    for part in ("trainval.txt: gone", "test.txt: 000099", "name no annotation file", "in no list"):
        assert part in notes_of(imported)


def test_several_years_below_one_folder(voc, tmp_path):
    for year in ("VOC2007", "VOC2012"):
        lists = {"train": "1\n", "val": f"{year}\n"}
        voc({"1": annotation(thing(year)), year: annotation(thing())}, lists, root=tmp_path / "kit" / year)
    imported = read_voc(tmp_path / "kit")
    assert splits_of(imported) == {"train": ["1", "1"], "val": ["VOC2007", "VOC2012"]}
    assert imported.classes == {1: "VOC2007", 2: "VOC2012", 3: "cat"}
    assert [item["category_id"] for sample in imported.splits["train"] for item in sample.objects] == [1, 2]


@pytest.mark.parametrize(
    ("annotations", "images"),
    [("train", "train"), ("train/annotations", "train/images"), ("Annotations/train", "JPEGImages/train")],
)
def test_folders_tell_the_splits_where_there_are_no_lists(voc, tmp_path, annotations, images):
    for split in ("train", "valid"):
        places = {"annotations": annotations.replace("train", split), "images": images.replace("train", split)}
        voc({"a": annotation(thing(split)), split: annotation()}, **places)
    imported = read_voc(tmp_path)
    assert splits_of(imported) == {"train": ["a", "train"], "val": ["a", "valid"]}
    assert imported.splits["val"][0].objects[0]["category_id"] == 2  # of the image in its own split


def test_a_flat_folder_is_train_or_what_its_name_says(voc, tmp_path):
    voc({"a": annotation(thing())}, annotations="mine", images="mine", ending=".JPG")
    voc({"b": annotation(thing())}, annotations="valid", images="valid")
    assert splits_of(read_voc(tmp_path / "mine")) == {"train": ["a"]}
    assert splits_of(read_voc(tmp_path / "valid")) == {"val": ["b"]}


@pytest.mark.parametrize(
    "tag", [None, "", "a.png", "A.JPG", "/home/me/a.jpg", "D:\\mine\\a.jpg", "stale.jpg", " a.jpg "]
)
def test_the_image_of_the_xmls_own_name_is_taken_whatever_the_tag_says(voc, tag):
    imported = read_voc(voc({"a": annotation(thing(), filename=tag), "stale": None}))
    assert boxes_of(imported) == {"a.jpg": [XYWH]} and ("another image" in notes_of(imported)) == (tag == "stale.jpg")


def test_a_tag_finds_the_image_of_another_name(voc, tmp_path, write_image):
    voc({"IMG_7": None})
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "7.xml").write_text(annotation(thing(), filename="C:\\x\\IMG_7.jpg"))
    (tmp_path / "Annotations" / "8.xml").write_text(annotation(thing(), filename="IMG_8.jpg"))
    imported = read_voc(tmp_path)
    assert boxes_of(imported) == {"IMG_7.jpg": [XYWH]} and "8.xml (filename IMG_8.jpg)" in notes_of(imported)


def test_masks_and_copies_of_a_images_name_are_not_taken(voc, tmp_path, write_image):
    voc({"a": annotation(thing(), filename="gone.jpg")}, annotations="annotations/xmls", images="images")
    for name in ("SegmentationClass/a.png", "annotations/trimaps/a.png", "Masks/a.png"):
        write_image(tmp_path / name)
    assert read_voc(tmp_path).splits["train"][0].path == tmp_path / "images" / "a.jpg"


@pytest.mark.parametrize("above", ["images", "img", "val"])
def test_the_folders_above_a_dataset_do_not_choose_its_images(voc, tmp_path, write_image, above):
    root = voc({"a": annotation(thing(), filename="a.png")}, root=tmp_path / above / "voc")
    write_image(root / "Depth" / "a.png")
    assert read_voc(root).splits["train"][0].path == root / "JPEGImages" / "a.jpg"
    split = tmp_path / above / "split"
    for name in ("train", "val"):
        voc({"a": annotation(thing(), filename="a.jpg")}, annotations=name, images=name, root=split)
    voc({"a": None}, images="images/train", root=split)
    voc({"a": None}, images="images/val", root=split)
    for name in ("train", "val"):
        (split / name / "a.jpg").unlink()
    assert read_voc(split).splits["val"][0].path == split / "images" / "val" / "a.jpg"


def test_of_two_suffixes_the_tag_decides(voc, tmp_path, write_image):
    for ending in (".jpg", ".png"):
        voc({"a": annotation(thing(), filename=f"a{ending}")}, annotations="x", images="x")
        write_image(tmp_path / "x" / "a.png")
        assert list(boxes_of(read_voc(tmp_path / "x"))) == [f"a{ending}"]


def test_accents_composed_in_another_way(voc, tmp_path, write_image):
    voc({})
    write_image(tmp_path / (unicodedata.normalize("NFD", "Käfer") + ".jpg"))
    (tmp_path / (unicodedata.normalize("NFC", "Käfer") + ".xml")).write_text(annotation(thing()))
    assert len(read_voc(tmp_path).splits["train"]) == 1


@pytest.mark.parametrize("size", [(0, 0), None, ("", ""), ("x", 40), ("80.0", "40.0"), (80, 40)])
def test_sizes_that_say_nothing_are_read_from_the_image(voc, size):
    imported = read_voc(voc({"a": annotation(thing(), size=size)}))
    assert imported.splits["train"][0].size == (40, 80)


def test_wrong_sizes(voc):
    swapped = annotation(thing(box=(1, 1, 70, 30)), size=(40, 80))
    resized = annotation(thing(box=(1, 1, 150, 70)), size=(160, 80))
    imported = read_voc(voc({"swapped": swapped, "resized": resized}))
    assert [sample.size for sample in imported.splits["train"]] == [(80, 160), (40, 80)]
    assert "training scales" in notes_of(imported) and "wrong size" in notes_of(imported)


@pytest.mark.parametrize(
    ("size", "box", "frame"),
    [((80, 40), BOX, (40, 80)), ((40, 80), BOX, (80, 40)), (None, (1, 50, 20, 70), (80, 40)), (None, BOX, (40, 80))],
)
def test_the_size_or_else_the_boxes_tell_the_frame_of_a_turned_image(voc, tmp_path, write_image, size, box, frame):
    voc({"a": annotation(thing(box=box), size=size)})
    write_image(tmp_path / "JPEGImages" / "a.jpg", orientation=6)
    assert read_voc(tmp_path).splits["train"][0].size == frame


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_the_frame_of_a_scaled_copy_of_a_turned_image_is_kept(voc, tmp_path, write_image, size):
    voc({"a": annotation(thing(box=(1, 2, 19, 18)), size=size)})
    write_image(tmp_path / "JPEGImages" / "a.jpg", orientation=6)
    assert read_voc(tmp_path).splits["train"][0].size == size[::-1]


@pytest.mark.parametrize(
    ("content", "boxes", "note"),
    [
        (thing(box=(10.5, 5.25, 20.75, 9)), [[10.5, 5.25, 10.25, 3.75]], ""),
        (thing(box=(30, 25, 11, 6)), [XYWH], "swapped"),
        (thing(box=(70, 30, 90, 50)), [[70, 30, 20, 20]], ""),
        (thing(box=(5, 5, 5, 9)), [], "no width"),
        (thing(box=(99, 5, 120, 9)), [], "outside"),
        (thing(box=("nan", 5, 9, 9)), [], "finite"),
        (thing(box=("a", 5, 9, 9)), [], "four numbers"),
        (thing() * 2, [XYWH], "repeat"),
        ("<object><name>cat</name></object>", [], "without a name or a bndbox"),
        ("<object><bndbox/></object>", [], "without a name or a bndbox"),
        (f"<objects>{thing()}</objects>", [XYWH], ""),
        (thing(extra=thing("part", (1, 1, 3, 3)).replace("object", "part")), [XYWH], ""),
        (TWO_BOXES, [XYWH, [1, 1, 2, 3]], ""),
    ],
)
def test_objects_and_what_is_none(voc, content, boxes, note):
    imported = read_voc(voc({"a": annotation(content), "b": annotation(thing())}))
    assert boxes_of(imported)["a.jpg"] == boxes and (note in notes_of(imported) if note else not imported.notes.places)
    assert imported.classes == {1: "cat"}


def test_difficult_objects_are_ignored_by_default(voc, tmp_path):
    voc({"a": annotation(thing(extra="<difficult>1</difficult>"), thing("dog", extra="<truncated>1</truncated>"))})
    imported = read_voc(tmp_path)
    assert [item["iscrowd"] for item in imported.splits["train"][0].objects] == [1, 0] and "--keep-dif" in notes_of(
        imported
    )
    kept = read_voc(tmp_path, keep_difficult=True)
    assert [item["iscrowd"] for item in kept.splits["train"][0].objects] == [0, 0] and not kept.notes.places


@pytest.mark.parametrize(
    ("declared", "encoding", "word"),
    [
        ("utf-8", "utf-8", "Käfer"),
        ("utf-8", "utf-8-sig", "Käfer"),
        ("utf-16", "utf-16", "Käfer"),
        (None, "latin-1", "Käfer"),
    ]
    + [
        ("ISO-8859-1", "latin-1", "Käfer"),
        ("utf-8", "latin-1", "Käfer"),
        ("utf-16", "utf-8", "Käfer"),
        ("gbk", "gbk", "猫"),
        ("no-such-code", "utf-8", "Käfer"),
        ("idna", "utf-8", "Käfer"),
    ],
)
def test_encodings_declared_or_not(voc, declared, encoding, word):
    head = f'<?xml version="1.0" encoding="{declared}"?>\n' if declared else ""
    imported = read_voc(voc({"a": annotation(thing(word), head=head).encode(encoding)}))
    assert imported.classes == {1: word} and boxes_of(imported) == {"a.jpg": [XYWH]}


@pytest.mark.parametrize(
    "xml",
    [annotation(thing(), attributes=' xmlns="http://x.y/z"'), annotation(thing(), filename="a & b.jpg")]
    + ["\n\n" + annotation(thing(), head='<?xml version="1.0"?>')],
)
def test_xml_that_is_nearly_right(voc, xml):
    assert boxes_of(read_voc(voc({"a": xml}))) == {"a.jpg": [XYWH]}


@pytest.mark.parametrize(
    ("xml", "note"),
    [("", "no element found"), (annotation(thing())[:70], "not valid"), ("<annotations/>", "<annotations>")],
)
def test_xml_that_is_none_is_noted(voc, xml, note):
    imported = read_voc(voc({"a": annotation(thing()), "b": xml}))
    assert list(boxes_of(imported)) == ["a.jpg"] and "b.xml" in notes_of(imported) and note in notes_of(imported)
    assert "without an annotation file" in notes_of(read_voc(voc({"c": None})))


def test_classes_by_alphabet_over_all_splits_or_as_given(voc):
    lists = {"train": "a", "val": "b"}
    root = voc({"a": annotation(thing("  traffic\n light ")), "b": annotation(thing("Ant"), thing("🐜"))}, lists)
    assert read_voc(root).classes == {1: "Ant", 2: "traffic light", 3: "🐜"}
    given = read_voc(root, classes=["🐜", "traffic light", "Ant", "bee"])
    assert given.classes[4] == "bee" and given.splits["train"][0].objects[0]["category_id"] == 2
    with pytest.raises(DataError, match="the objects 🐜 are not among the classes Ant, traffic light"):
        read_voc(root, classes=["Ant", "traffic light"])


def test_two_xmls_of_one_image_count_once(voc, tmp_path):
    voc({"a": annotation(thing())})
    (tmp_path / "Annotations_old").mkdir()
    (tmp_path / "Annotations_old" / "a.xml").write_text(annotation(thing(box=(1, 1, 9, 9))))
    imported = read_voc(tmp_path)
    assert boxes_of(imported) == {"a.jpg": [XYWH]} and "whose image belongs to another one" in notes_of(imported)


def test_images_that_cannot_be_read_are_noted(voc, tmp_path):
    voc({"a": annotation(thing()), "b": annotation(thing())})
    (tmp_path / "JPEGImages" / "b.jpg").write_bytes(b"not an image")
    imported = read_voc(tmp_path)
    assert list(boxes_of(imported)) == ["a.jpg"] and "b.jpg: this image cannot be read" in notes_of(imported)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("gone", "not a folder"), ("a.xml", "not a folder"), ("yolo", r"no xml file \(but there are 1 \.txt")],
)
def test_what_is_no_voc_folder_is_refused(tmp_path, name, sentence):
    (tmp_path / "a.xml").write_text(annotation(thing()))
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo" / "a.txt").write_text("0 .5 .5 1 1")
    with pytest.raises(DataError, match=sentence):
        read_voc(tmp_path / name)


def test_resized_images_train_with_scaled_boxes(voc, tmp_path):
    voc({"a": annotation(thing(box=(0, 0, 160, 40)), size=(160, 80))})
    datasets, base = to_coco(read_voc(tmp_path))
    (tmp_path / "x.json").write_text(json.dumps(datasets["train"]))
    image, target = CocoDetection(tmp_path / "x.json", base, train=True)[0]
    assert image.shape == (3, 40, 80) and target["boxes"].tolist() == [[0, 0, 80, 20]]
