"""Packaging of kvoffload.

`kvoffload/kernels` and `kvoffload/profiler` are relative links to the folders of the same name beside this file
(docs/adr/0001-links-for-kernels-and-profiler.md); setuptools follows them, so a wheel holds ordinary folders.
"""

from pathlib import Path

from setuptools import setup

RUNTIME = [
    "torch>=2.11",
    "transformers>=5.17,<6",  # a release that was not tested is checked when it is used: kvoffload/hf/contract.py
    'triton; sys_platform == "linux"',  # kernels; no bound, each torch release brings the version it fits
    "pulp>=3.0,<4",  # states the planner's linear program
    "highspy>=1.10,<2",  # solves it
    "numpy>=1.26",
    "scipy>=1.11",  # fits the roofline
    "packaging>=24",  # compares releases of transformers, which requires it as well
    "typer>=0.15,<1",  # command line; transformers requires it as well
    "rich>=13.8",  # tables and progress on a terminal; typer requires it as well
]
REPORT = ["plotly>=6.1,<8"]  # the charts of `kvoffload report`
DEV = [
    "pytest>=8.4",
    "pytest-xdist>=3.8",
    "ruff>=0.12",
    "mypy>=1.17",
    "pre-commit>=4.0",
    "peft>=0.17",
    "matplotlib>=3.9",
    "pdoc>=15",  # the reference of public names
    "markdown-it-py>=3",  # reads the documents in tests; rich requires it as well
    "selenium>=4.30",  # the report in a real browser
]
ROOT = Path(__file__).parent
PACKAGES = sorted(
    {
        ".".join(path.parent.relative_to(ROOT).parts)
        for pattern in ("*.py", "*/*.py", "*/*/*.py")
        for path in (ROOT / "kvoffload").glob(pattern)
    }
)

setup(
    name="kvoffload",
    version="0.1.0",
    description="generate() with the live KV cache in host memory: same tokens, planned and overlapped",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={
        "kvoffload": ["py.typed"],
        "kvoffload.machine": ["presets.json"],
        "kvoffload.model": ["known_models.json"],
        "kvoffload.profiler.drawing": ["page.css", "page.js"],
    },
    include_package_data=False,
    install_requires=RUNTIME,
    extras_require={"dev": DEV + REPORT, "nvml": ["nvidia-ml-py>=12.560"], "report": REPORT},
    entry_points={"console_scripts": ["kvoffload = kvoffload.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
