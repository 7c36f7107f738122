"""Masks from boxes and points on a keyframe: SAM2, or optical flow where no weights are present."""
