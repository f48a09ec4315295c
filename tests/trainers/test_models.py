import numpy as np
import pytest

from scalestudy.trainers.models import MODELS, initial_parameters, model_spec, parameter_count
from scalestudy.trainers.trial import Data

DIGITS = Data(source="digits", channels=1, image_size=32, classes=10)
IMAGENET = Data(source="synthetic", channels=3, image_size=224, classes=1000)

# DESIGN section 5; the ResNets' are torchvision's.
PARAMETERS = {
    "cnn": 61_706,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


def test_every_model_has_its_parameter_count_stated() -> None:
    assert set(PARAMETERS) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count(name: str) -> None:
    assert parameter_count(model_spec(name, DIGITS if name == "cnn" else IMAGENET)) == PARAMETERS[name]


def test_first_values_depend_on_the_seed_alone() -> None:
    spec = model_spec("cnn", DIGITS)
    first, again, other = initial_parameters(spec, 1), initial_parameters(spec, 1), initial_parameters(spec, 2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["conv1.weight"], other["conv1.weight"])


def test_convolutions_start_with_the_variance_of_he() -> None:
    weight = initial_parameters(model_spec("resnet18", IMAGENET), 1)["layer4.0.conv2.weight"]
    # 2.4 million values: the sample's deviation lies within 0.2 % of the true one.
    assert weight.std() == pytest.approx(np.sqrt(2 / (512 * 9)), rel=0.005)


def test_an_image_too_small_for_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="a 5×5 kernel meets 4×4 values"):
        model_spec("cnn", Data(source="synthetic", channels=1, image_size=12, classes=10))
