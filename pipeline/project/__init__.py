"""The checkout itself: recipes merged into params.yaml, and lock files that a killed DVC left."""
