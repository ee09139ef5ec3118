"""Accuracy and evidence of the trained models on held-out images."""
