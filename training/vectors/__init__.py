"""Building steering vectors, one method a file."""
