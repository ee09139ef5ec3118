"""What a student is trained on: each method a sum of named terms, each term a file; see `table`."""
