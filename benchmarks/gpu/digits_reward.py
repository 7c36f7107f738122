"""A reward that differs between the responses of a random model, so that gradients are not 0."""


def reward(response: str, ground_truth: object, **_: object) -> float:
    """Return the share of even digits among the response's digits."""
    digits = [int(c) for c in response if c in "0123456789"]
    return sum(d % 2 == 0 for d in digits) / max(1, len(digits))
