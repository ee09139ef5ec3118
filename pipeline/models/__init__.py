"""timm models and their checkpoints: the ViT teacher with its taps, the CNN student with its tap."""
