"""The feature cache: outputs of the frozen teacher for V views of every training image, written once.

A record is one view of one image, sample-major: record = position of the image in train * V + view. Records are in
safetensors shards beside `manifest.json`, which identifies teacher, images and views. Format: docs/store.md.
"""
