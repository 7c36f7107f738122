"""`python -m rcot_rl.cli`."""

from rcot_rl.cli.main import main

main()
