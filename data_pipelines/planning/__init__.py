"""Choose which (video, expression, frame) becomes which row, before any image is decoded."""
