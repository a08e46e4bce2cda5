"""Files and data sets as batches: readers, decoding, sources, transforms, order."""
