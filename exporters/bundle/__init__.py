"""The edge bundle: a folder that runs on a device without this repository and without torch."""
