"""Where pictures come from: one file a kind of container; each gives classes and samples, and decodes lazily."""
