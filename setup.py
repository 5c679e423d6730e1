"""Builds and installs bnfast.

`kernels/` stands beside `bnfast/` in the repository, because it knows nothing of the layers above it, and is
installed as `bnfast.kernels`: a top-level package called `kernels` would overwrite another project's.
"""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
PARTS = (
    "checks", "fusing", "kernels", "kernels.normalizers", "modules", "ops", "ptx", "reference",
)  # fmt: skip


def version() -> str:
    """The one version number, read (not imported: torch may be absent) from `bnfast/__init__.py`."""
    source = (HERE / "bnfast" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__\s*(?::\s*\w+\s*)?=\s*"([^"]+)"', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('bnfast/__init__.py has no line of the form __version__ = "..."')
    return found.group(1)


setup(
    name="bnfast",
    version=version(),
    description="Normalization layers for PyTorch, fused into Triton kernels, as drop-ins",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the bnfast authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "bnfast",
        *(f"bnfast.{part}" for part in PARTS),
        "bnfast.kernels",
        "bnfast.kernels.normalizers",
    ],
    package_dir={"bnfast.kernels": "kernels"},
    package_data={"bnfast": ["py.typed"], "bnfast.ptx": ["*.c", "*.h"]},
    # Tested: PyTorch 2.11.0 with Triton 3.6.0 and 2.15.0 with 3.9.0, which the requirements files pin;
    # and the machine code of Triton 3.7.1 and 3.8.0.
    install_requires=["torch>=2.11"],
    extras_require={
        # Not required: without Triton or without a GPU, layers run on plain torch. Torch's own CUDA builds
        # bring the Triton that fits them.
        "triton": ["triton>=3.6,<3.10"],
        "test": ["pytest>=8", "expecttest", "hypothesis", "ruff", "mypy", "numpy"],
        "benchmark": ["matplotlib", "numpy", "pandas", "pytest-benchmark", "scikit-learn", "tqdm"],
    },
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
