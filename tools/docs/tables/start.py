"""What an installation costs."""

from __future__ import annotations

from lines import link, one

INSTALL = "compile_cost"


def install() -> str:
    """How long an installation with all images takes, from its one line."""
    found = one(INSTALL, kind="install", what="make demo, until the package is installed")
    return (
        f"With `nvcc` and all five targets an installation took **{found['seconds']} seconds** on two idle cores of an "
        f"AMD EPYC ({found['compiler']}; a fresh clone, in which the build tools were fetched as well; one run: "
        f"{link('line', INSTALL)})."
    )
