"""What every detector has in common: normalized images in, boxes of the stored images out, a head that predicts."""

import pytest
import torch

from brs_detr.models.config import HardNMS, NoNMS, SoftNMS
from brs_detr.models.detector import Detector, to_stored_images
from brs_detr.ops.images import ImageBatch


class TwoHeads(Detector):
    """A detector that finds one box per image, as large as the image inside the padding."""

    heads = ("first", "second")

    def encode(self, x, padding):
        return x

    def losses(self, features, sizes, targets):
        return {self.predict_with: features.sum()}

    def detect(self, features, images):
        boxes = [{"boxes": torch.tensor([[0.0, 0.0, w, h]])} for h, w in images.sizes]
        return to_stored_images(boxes, images)


def test_the_head_that_predicts_is_chosen_by_name():
    model = TwoHeads(3)
    assert model.predict_with == "first"
    model.predict_with = "second"
    assert model.predict_with == "second"
    model.predict_with = "auto"  # the detector's own choice
    assert model.predict_with == "first"


def test_a_head_that_the_detector_does_not_have_is_refused_with_its_own():
    model = TwoHeads(3)
    with pytest.raises(ValueError, match=r"eval\.predict_with=third: this detector has first, second\. Use auto\."):
        model.predict_with = "third"
    assert model.predict_with == "first"


def test_all_heads_may_be_joined_where_there_are_several():
    model = TwoHeads(3)
    model.predict_with = "ensemble"
    assert model.predict_with == "ensemble"
    with pytest.raises(ValueError, match="no validation has scored the heads of these weights"):
        model.eval()([torch.zeros(3, 4, 4)])
    model.heads = ("first",)
    with pytest.raises(ValueError, match=r"eval\.predict_with=ensemble: this detector has first\. Use auto\."):
        model.predict_with = "ensemble"


def test_suppression_of_a_detector_that_suppresses_already_is_refused():
    model = TwoHeads(3)
    model.nms = NoNMS()
    with pytest.raises(ValueError, match=r"eval\.nms\.kind=hard: this detector suppresses already"):
        model.nms = HardNMS()
    model.overlapping = ("first",)
    model.nms = HardNMS(iou=0.4)
    assert model.nms.iou == model.join_iou == 0.4
    model.nms = SoftNMS(iou=0.3)
    assert model.join_iou == HardNMS().iou  # views and heads are joined by another rule


def test_a_box_as_large_as_the_resized_image_is_as_large_as_the_stored_one():
    resized = [torch.zeros(3, 20, 10), torch.zeros(3, 8, 30)]
    images = ImageBatch.from_list(resized, [(40, 30), (8, 15)])
    found = TwoHeads(3).eval()(images)
    assert [image["boxes"].tolist() for image in found] == [[[0, 0, 30, 40]], [[0, 0, 15, 8]]]


def test_padding_of_any_color_is_0_and_gray_is_what_its_mean_and_deviation_say():
    model = TwoHeads(3)
    pixels = torch.full((1, 3, 2, 2), 100.0)
    padding = torch.tensor([[[False, True], [False, True]]])
    x = model.normalize(pixels, padding)
    expected = torch.tensor([(100 - 123.675) / 58.395, (100 - 116.28) / 57.12, (100 - 103.53) / 57.375])
    assert torch.allclose(x[0, :, :, 0], expected[:, None].expand(3, 2)) and (x[..., 1] == 0).all()
