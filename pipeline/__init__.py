"""The library: cross-architecture distillation from a ViT to a small CNN, without argv, DVC or fixed paths."""
