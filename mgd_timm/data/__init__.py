"""Load data sets as batches of images. Start at dataset.py; readers/ reads the file formats."""
