"""`python -m reshard` is `reshard`; torchrun's `-m reshard` comes in here."""

from reshard.cli import main

main()
