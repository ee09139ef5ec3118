"""The training loop that both teacher and student use: resumable, on one process or several ranks."""
