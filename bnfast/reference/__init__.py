"""The same maths in plain torch, a file for each normalization: oracle, and what is differentiated again."""
