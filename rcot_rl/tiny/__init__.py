"""The shipped tiny models: how they are made (`make models`), not how they are used."""
