"""Scripts that make and judge the shipped tiny models (`make models`); nothing else uses them."""
