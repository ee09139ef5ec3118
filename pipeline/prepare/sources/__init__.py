"""Where images come from: one file for each kind of container; each returns classes and lazy samples."""
