"""One thin file per DVC stage: paths in, paths out, one section of params.yaml, one call."""

import os

from pipeline.core import cli

# Before the slow imports of the stage itself, so that a killed dvc leaves no stage behind.
if "DVC_STAGE" in os.environ:
    cli.die_with_parent()
