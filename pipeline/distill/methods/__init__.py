"""Training objectives of a student: each method is a sum of named terms, each term a file; see `table`."""
