"""The files of an evaluation, in place of those of an earlier one."""

from brs_detr.data.coco import CocoDetection
from brs_detr.data.synthetic import make_dataset
from brs_detr.evaluation.summary import Summary
from brs_detr.run.drawings import write_evaluation


def test_drawings_of_images_that_are_no_longer_shown_go_and_other_files_stay(tmp_path):
    data, out = make_dataset(tmp_path / "data", train=4, val=2, image_size=72), tmp_path / "out"
    of_predict = out / "detections" / "1.png"  # whose image had a number as its name, as many datasets have
    for own in (of_predict, out / "evaluated" / "mine.png"):
        own.parent.mkdir(parents=True)
        own.touch()
    for split, count in (("train", 4), ("val", 2), ("val", 0)):
        dataset = CocoDetection(data / "annotations" / f"{split}.json", data / "images" / split, train=False)
        report = tmp_path / "report.html"
        write_evaluation(out, Summary({}, []), [], dataset, {}, run=tmp_path, report=report, images=count)
        expected = {f"{number}.png" for number in dataset.image_ids[:count]} | {"mine.png"}
        assert {path.name for path in (out / "evaluated").iterdir()} == expected
        assert list(of_predict.parent.iterdir()) == [of_predict] and not of_predict.stat().st_size
        assert (out / "detections.png").is_file() == (count > 0)
