"""The runner of an edge bundle, where it is the package `bundle`: Python 3.8, NumPy and one runtime."""
