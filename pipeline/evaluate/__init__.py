"""Evaluation of teacher and students on held-out images: accuracy and its evidence."""
