"""The teacher-feature store: what the frozen teacher made of V views of every training image, written once.

A record is one view of one image, sample-major: record = position of the image in train * V + view. Records lie in
safetensors shards beside `manifest.json`, which says whose they are; the format is docs/store.md.
"""
