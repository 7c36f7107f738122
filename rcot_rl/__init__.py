"""RCoT-Seg as a platform: data, CoT-SFT, GRPO on verl, two-stage inference, evaluation."""

__version__ = "0.1.0"
