"""Which (video, expression, frame) becomes which row, decided before an image is decoded."""
