"""Label spaces, COCO files, conversion of annotations, and the cache of images."""
