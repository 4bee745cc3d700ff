from glob import glob

from setuptools import find_packages, setup

NAME = "densegeo_ros"

setup(
    name=NAME,
    version="0.1.0",
    packages=find_packages(),
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", glob("launch/*.launch.py")),
        (f"share/{NAME}/config", glob("config/*.*")),
    ],
    install_requires=["setuptools"],  # densegeo itself is installed with pip, for the Python that ROS uses
    zip_safe=False,
    maintainer="densegeo developers",
    maintainer_email="maintainers@densegeo.invalid",
    description="Depth and surface normals from single-step diffusion models: a lifecycle node over densegeo.",
    license="Apache-2.0",
    entry_points={"console_scripts": [f"geometry = {NAME}.node:main"]},
)
