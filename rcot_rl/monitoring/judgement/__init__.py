"""Rules that judge a run: alerts while it trains, a verdict in words, the paper's landmarks."""
