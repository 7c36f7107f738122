"""What can be learned about a reward without training: contract, explanation, exploits."""
