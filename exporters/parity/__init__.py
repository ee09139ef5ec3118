"""Comparison of two artefacts on the same images, as a whole or layer by layer."""
