"""Packaging reads `settings.ini`, the one place that holds names, version and requirements."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser()
settings.read("settings.ini", encoding="utf-8")
s = settings["DEFAULT"]

setup(
    name=s["lib_name"],
    version=s["version"],
    description=s["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=s["author"],
    url=s["git_url"],
    license="Apache-2.0",
    keywords=s["keywords"],
    packages=find_packages(include=["jat_nb", "jat_nb.*"]),
    package_data={"jat_nb": ["py.typed", "zoo/*.safetensors", "published/*.csv"]},
    python_requires=f">={s['min_python']}",
    install_requires=s["requirements"].split(),
    extras_require={"dev": s["dev_requirements"].split(), "autoattack": s["autoattack_requirements"].split(),
                    "minimum-norm": s["minimum_norm_requirements"].split(),
                    "corruptions": s["corruptions_requirements"].split()},
    entry_points={"nbdev": [f"{s['lib_name']}={s['lib_path']}._modidx:d"],
                  "console_scripts": s["console_scripts"].split()},
    zip_safe=False,
)
