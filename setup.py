"""The packages of the wheel: `brs_detr`, and as its data the recipes, whose folder lies at the top of the checkout.

Everything else is in pyproject.toml, whose table of packages cannot add a folder to those that it finds.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["brs_detr", "brs_detr.*"]),
        "brs_detr.configs",
        "brs_detr.configs.accelerate",
        "brs_detr.configs.cnn",
    ],
    package_dir={"brs_detr.configs": "configs"},
)
