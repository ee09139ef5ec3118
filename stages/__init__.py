"""One thin file a DVC stage: paths in, paths out, one section of params, one call."""

import os

from pipeline.core import cli

if (
    "DVC_STAGE" in os.environ
):  # before the slow imports, so that a killed dvc leaves no stage behind
    cli.die_with_parent()
