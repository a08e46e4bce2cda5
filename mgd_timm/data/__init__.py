"""Files and data sets as batches of images. Start at dataset.py; another file format is added in readers/."""
