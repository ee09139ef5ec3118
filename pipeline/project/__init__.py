"""The checkout: recipes that are merged into params.yaml, and lock files of a killed DVC."""
