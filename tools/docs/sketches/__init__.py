"""The drawings of docs/images, one file for each."""
