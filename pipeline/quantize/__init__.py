"""Quantization-aware distillation: fine-tuning of a student under the int8 of its exported network."""
